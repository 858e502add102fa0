package schema

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// ID returns the identifier that follows from the parts: 32 hexadecimal digits, the same on every try. The parts must
// not hold line breaks.
func ID(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\n")))
	return hex.EncodeToString(sum[:16])
}
