package scoring

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
)

// LatentValues returns the numbers of a latent, which are little-endian float32, float16 or bfloat16. The error says
// which is not finite.
func LatentValues(numbers []byte, dtype string) ([]float32, error) {
	size, read := 2, diffusion.FromFloat16
	switch dtype {
	case diffusion.Float16:
	case diffusion.BFloat16:
		read = diffusion.FromBFloat16
	case diffusion.Float32:
		size = 4
	default:
		return nil, fmt.Errorf("dtype is %q, must be float32, float16 or bfloat16", dtype)
	}
	values := make([]float32, len(numbers)/size)
	for i := range values {
		if size == 4 {
			values[i] = math.Float32frombits(binary.LittleEndian.Uint32(numbers[4*i:]))
		} else {
			values[i] = read(binary.LittleEndian.Uint16(numbers[2*i:]))
		}
		if v := float64(values[i]); math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, fmt.Errorf("element %d is %v, must be finite", i, v)
		}
	}
	return values, nil
}
