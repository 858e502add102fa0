package schema

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// ID returns the identifier that follows from the parts: 32 hexadecimal digits, the same on every try. The parts must
// not hold line breaks.
func ID(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\n")))
	return hex.EncodeToString(sum[:16])
}

// Digest returns the SHA-256 of a message's payload and its CloudEvents headers, lower-case hex. Two messages with the
// same source and id, but different digests, are different events. The order and the case of header names do not
// count, nor do headers of the transport.
func Digest(header map[string][]string, payload []byte) string {
	type pair struct{ name, value string }
	var pairs []pair
	for name, values := range header {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "ce-") || lower == "content-type" {
			for _, value := range values {
				pairs = append(pairs, pair{lower, value})
			}
		}
	}
	slices.SortFunc(pairs, func(a, b pair) int {
		if c := strings.Compare(a.name, b.name); c != 0 {
			return c
		}
		return strings.Compare(a.value, b.value)
	})
	h := sha256.New()
	for _, p := range pairs {
		fmt.Fprintf(h, "%d:%s=%d:%s\n", len(p.name), p.name, len(p.value), p.value)
	}
	h.Write([]byte{0})
	h.Write(payload)
	return hex.EncodeToString(h.Sum(nil))
}
