package diffusion

import (
	"math"
	"math/bits"
)

// philox4x32 returns the four words of Philox4x32-10 for a counter and a key.
//
// Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
func philox4x32(counter [4]uint32, key [2]uint32) [4]uint32 {
	for range 10 {
		high0, low0 := bits.Mul32(0xD2511F53, counter[0])
		high1, low1 := bits.Mul32(0xCD9E8D57, counter[2])
		counter = [4]uint32{high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0}
		key[0] += 0x9E3779B9
		key[1] += 0xBB67AE85
	}
	return counter
}

// MaxTorchCUDA is the largest draw that TorchCUDA reproduces. PyTorch gives each of the first numbers a thread of its
// own; how many threads there are depends on the GPU, and the smallest that still runs current PyTorch has more than
// this.
const MaxTorchCUDA = 1 << 15

// TorchCUDA draws what torch.randn(n, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) draws for n
// up to MaxTorchCUDA: element i of draw d is the first normal that cuRAND's Philox4x32-10 gives for key seed,
// subsequence i, offset 4d. The GPU's fast sine and logarithm differ in the last bits. Reference:
// aten/src/ATen/native/cuda/DistributionTemplates.h of PyTorch; curand_normal.h of cuRAND.
type TorchCUDA struct {
	seed  uint64
	draws uint64
}

// Draw implements Noise.
func (t *TorchCUDA) Draw(dst []float32) {
	key := [2]uint32{uint32(t.seed), uint32(t.seed >> 32)}
	for i := range dst {
		words := philox4x32([4]uint32{uint32(t.draws), uint32(t.draws >> 32), uint32(i), uint32(uint64(i) >> 32)}, key)
		// Uniforms in (0, 1] and (0, 2 pi], in single precision as on the GPU.
		const inverse = 0x1p-32
		const inverse2Pi = float32(inverse * 2 * math.Pi)
		u := float32(words[0])*float32(inverse) + float32(inverse/2)
		v := float32(words[1])*inverse2Pi + inverse2Pi/2
		dst[i] = float32(math.Sqrt(-2*math.Log(float64(u))) * math.Sin(float64(v)))
	}
	t.draws++
}

// Decuwatch is the generator to choose by default: counter-based, the same on every device, in a
// dozen lines of any language. Draw d fills elements 4k to 4k+3 from the four words w of Philox4x32-10 with
//
//	counter = (k low, k high, d, 0x75636564)    key = (seed low, seed high)
//	u_j = (w_j + 1/2) / 2^32
//	r = sqrt(-2 ln u_0), t = 2 pi u_1:  r cos t, r sin t;  then the same with u_2, u_3
//
// in double precision, rounded to single.
type Decuwatch struct {
	seed  uint64
	draws uint32
}

// decuwatchDomain keeps the counters apart from other uses of Philox with the same key: "decu", little-endian.
const decuwatchDomain = 0x75636564

// Draw implements Noise.
func (g *Decuwatch) Draw(dst []float32) {
	key := [2]uint32{uint32(g.seed), uint32(g.seed >> 32)}
	for at := 0; at < len(dst); at += 4 {
		k := uint64(at / 4)
		words := philox4x32([4]uint32{uint32(k), uint32(k >> 32), g.draws, decuwatchDomain}, key)
		var normals [4]float32
		for j := 0; j < 4; j += 2 {
			radius := math.Sqrt(-2 * math.Log((float64(words[j])+0.5)/(1<<32)))
			sin, cos := math.Sincos(2 * math.Pi * (float64(words[j+1]) + 0.5) / (1 << 32))
			normals[j], normals[j+1] = float32(radius*cos), float32(radius*sin)
		}
		copy(dst[at:], normals[:])
	}
	g.draws++
}
