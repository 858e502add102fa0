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

// MaxTorchCUDA is the largest draw that TorchCUDA reproduces without knowing the GPU. PyTorch gives each of the first
// numbers a thread of its own; how many threads there are depends on the GPU, and the smallest that still runs current
// PyTorch has more than this.
const MaxTorchCUDA = 1 << 15

// TorchCUDA draws what torch.randn(n, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) draws, but
// for the last bits, which the GPU's fast sine and logarithm change.
//
// PyTorch's kernel runs in blocks of 256 threads, as many as n needs and the GPU holds: T threads. Element i comes from
// thread i mod T, which has a subsequence of cuRAND's Philox4x32-10 to itself, and is normal number floor(i/T) mod 4 of
// its call floor(i/4T) of curand_normal4. float64 has two normals a call instead of four. A draw advances the
// generator's offset by four for each call that a thread made.
//
// Reference: aten/src/ATen/native/cuda/DistributionTemplates.h of PyTorch (calc_execution_policy,
// distribution_elementwise_grid_stride_kernel); curand_normal.h of cuRAND.
type TorchCUDA struct {
	key    [2]uint32
	draw   Draw
	blocks int    // that the GPU holds
	calls  uint64 // that every thread has made: a quarter of the generator's offset
}

// NewTorchCUDA returns the generator at the given seed, for a draw that NewNoise accepts.
func NewTorchCUDA(seed uint64, d Draw) *TorchCUDA {
	t := &TorchCUDA{key: [2]uint32{uint32(seed), uint32(seed >> 32)}, draw: d, calls: d.Offset / 4}
	t.blocks = d.GPU.SMs * (d.GPU.ThreadsPerSM / blockThreads)
	if d.GPU == (GPU{}) {
		t.blocks = MaxTorchCUDA / blockThreads // every GPU holds as many, and a draw needs no more
	}
	return t
}

// Draw implements Noise.
func (t *TorchCUDA) Draw(dst []float32) {
	first, all := t.draw.Batch.Index*len(dst), t.draw.images()*len(dst)
	threads, normals := blockThreads*min(t.blocks, (all+blockThreads-1)/blockThreads), 4
	if t.draw.Dtype == Float64 {
		normals = 2
	}
	for i := range dst {
		element := first + i
		counter := t.calls + uint64(element/(normals*threads))
		thread, number := uint64(element%threads), element/threads%normals
		words := philox4x32([4]uint32{uint32(counter), uint32(counter >> 32), uint32(thread), uint32(thread >> 32)}, t.key)
		if normals == 2 {
			dst[i] = float32(normalDouble(words, number))
		} else {
			dst[i] = normalSingle(words[number&^1], words[number|1], number)
		}
	}
	round(dst, t.draw.Dtype)
	t.calls += uint64((all-1)/(normals*threads) + 1)
}

// normalSingle returns the first or second normal (of an even or odd number) that Box-Muller makes of two words: the
// uniforms lie in (0, 1] and (0, 2 pi], in single precision as on the GPU.
func normalSingle(x, y uint32, number int) float32 {
	const inverse = 0x1p-32
	const inverse2Pi = float32(inverse * 2 * math.Pi)
	u := float32(x)*float32(inverse) + float32(inverse/2)
	v := float32(y)*inverse2Pi + inverse2Pi/2
	wave := math.Sin(float64(v))
	if number%2 == 1 {
		wave = math.Cos(float64(v))
	}
	return float32(math.Sqrt(-2*math.Log(float64(u))) * wave)
}

// normalDouble returns the first or second normal that Box-Muller makes of four words, with uniforms of 53 bits.
func normalDouble(w [4]uint32, number int) float64 {
	u := float64(uint64(w[0])^uint64(w[1])<<21)*0x1p-53 + 0x1p-54
	v := float64(uint64(w[2])^uint64(w[3])<<21)*0x1p-52 + 0x1p-53
	sin, cos := math.Sincos(v * math.Pi)
	if number == 1 {
		sin = cos
	}
	return math.Sqrt(-2*math.Log(u)) * sin
}

// Decuwatch is the generator to choose by default: counter-based, the same on every device, in a
// dozen lines of any language. Draw d fills elements 4k to 4k+3 from the four words w of Philox4x32-10 with
//
//	counter = (k low, k high, d, 0x75636564)    key = (seed low, seed high)
//	u_j = (w_j + 1/2) / 2^32
//	r = sqrt(-2 ln u_0), t = 2 pi u_1:  r cos t, r sin t;  then the same with u_2, u_3
//
// in double precision, rounded to single. The images of a batch are the parts of one draw.
type Decuwatch struct {
	seed  uint64
	draw  Draw
	draws uint32
}

// decuwatchDomain keeps the counters apart from other uses of Philox with the same key: "decu", little-endian.
const decuwatchDomain = 0x75636564

// Draw implements Noise.
func (g *Decuwatch) Draw(dst []float32) {
	key := [2]uint32{uint32(g.seed), uint32(g.seed >> 32)}
	first := g.draw.Batch.Index * len(dst)
	for at := first / 4 * 4; at < first+len(dst); at += 4 {
		k := uint64(at / 4)
		words := philox4x32([4]uint32{uint32(k), uint32(k >> 32), g.draws, decuwatchDomain}, key)
		var normals [4]float32
		for j := 0; j < 4; j += 2 {
			radius := math.Sqrt(-2 * math.Log((float64(words[j])+0.5)/(1<<32)))
			sin, cos := math.Sincos(2 * math.Pi * (float64(words[j+1]) + 0.5) / (1 << 32))
			normals[j], normals[j+1] = float32(radius*cos), float32(radius*sin)
		}
		if at < first {
			copy(dst, normals[first-at:])
		} else {
			copy(dst[at-first:], normals[:])
		}
	}
	round(dst, g.draw.Dtype)
	g.draws++
}
