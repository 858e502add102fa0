package diffusion

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/mathext/prng"
)

// ErrUnknownGenerator is returned by NewNoise for an unknown name.
var ErrUnknownGenerator = errors.New("unknown noise generator")

// ErrNoiseSize is returned by NewNoise for a size at which the generator's numbers depend on the producer's device, if
// the draw does not name it, and for a draw of too many numbers.
var ErrNoiseSize = errors.New("noise cannot be drawn at this size")

// ErrNoiseDraw is returned by NewNoise for a draw that the generator cannot repeat.
var ErrNoiseDraw = errors.New("draw cannot be repeated")

// Noise draws standard normal numbers from a seed, draw after draw, as its producer does.
type Noise interface {
	// Draw fills dst with the next draw. The sizes and the order of draws must be the producer's. Of a batch, dst gets
	// the numbers of one image.
	Draw(dst []float32)
}

// NewNoise returns the generator with the given name, seeded, for draws of size numbers for each image:
//
//   - torch-cpu: torch.randn with a CPU generator
//   - torch-cuda: torch.randn with a CUDA generator; beyond MaxTorchCUDA numbers, the draw must name the GPU
//   - decuwatch: this project's own, see Decuwatch
//
// Numbers that were drawn as float16 or bfloat16 were drawn as float32 and rounded. float64 is rounded to float32.
func NewNoise(name string, seed uint64, size int, d Draw) (Noise, error) {
	if !slices.Contains([]string{"torch-cpu", "torch-cuda", "decuwatch"}, name) {
		return nil, fmt.Errorf("%w: %q, known are torch-cpu, torch-cuda, decuwatch", ErrUnknownGenerator, name)
	}
	if err := d.check(name, size); err != nil {
		return nil, err
	}
	switch name {
	case "torch-cpu":
		t := NewTorchCPU(seed)
		t.draw = d
		return t, nil
	case "torch-cuda":
		return NewTorchCUDA(seed, d), nil
	}
	return &Decuwatch{seed: seed, draw: d}, nil
}

// TorchCPU draws what torch.randn(n, generator=torch.Generator().manual_seed(seed)) draws, to within a few units in
// the last place of float32: PyTorch computes logarithm, sine and cosine with vector instructions of the CPU at hand.
//
// The numbers come from MT19937 seeded with the low 32 bits of the seed. From 16 numbers on, uniforms of 24 bits fill
// the tensor and Box-Muller turns blocks of 16 into normals, element j with element j+8; a size that 16 does not
// divide draws its last 16 again. float64 has uniforms of 53 bits. Below 16, Box-Muller works in double precision on 53
// bits and keeps its second number for the next call. Reference: aten/src/ATen/native/cpu/DistributionTemplates.h of
// PyTorch.
type TorchCPU struct {
	source *prng.MT19937
	draw   Draw
	cached float64
	full   bool // cached holds a number
}

// NewTorchCPU returns the generator of float32 for one image, at the given seed.
func NewTorchCPU(seed uint64) *TorchCPU {
	source := prng.NewMT19937()
	source.Seed(seed)
	return &TorchCPU{source: source}
}

// block is how many numbers Box-Muller makes at a time.
const block = 16

// Draw implements Noise.
func (t *TorchCPU) Draw(dst []float32) {
	first, all := t.draw.Batch.Index*len(dst), t.draw.images()*len(dst)
	if all < block {
		for i := range all {
			if v := float32(t.double()); i >= first && i < first+len(dst) {
				dst[i-first] = v
			}
		}
		return
	}
	for at := 0; at < all; at += block {
		t.fill(dst, at-first, min(block, all-at))
	}
	if all%block != 0 {
		t.fill(dst, all-block-first, block)
	}
}

// fill draws the uniforms of the block that begins at dst[at], and writes its normals to what dst has of it. Of a block
// that is not full, the uniforms are drawn only.
func (t *TorchCPU) fill(dst []float32, at, n int) {
	var uniforms [block]float64
	inside := n == block && at+block > 0 && at < len(dst)
	for i := range n {
		u := t.uniform()
		if inside {
			uniforms[i] = u
		}
	}
	if !inside {
		return
	}
	t.boxMuller(&uniforms)
	from := max(0, -at)
	for i := from; i < min(block, len(dst)-at); i++ {
		dst[at+i] = float32(uniforms[i])
	}
}

// uniform returns a number in [0, 1): a multiple of 2^-24, or of 2^-53 for float64.
func (t *TorchCPU) uniform() float64 {
	if t.draw.Dtype == Float64 {
		return t.uniform53()
	}
	return float64(t.source.Uint32()&(1<<24-1)) / (1 << 24)
}

// boxMuller turns uniforms into normals: the radius comes from 1 minus the first eight, the angle from the others.
func (t *TorchCPU) boxMuller(u *[block]float64) {
	for j := range block / 2 {
		radius := math.Sqrt(-2 * math.Log(1-u[j]))
		sin, cos := math.Sincos(2 * math.Pi * u[j+block/2])
		u[j], u[j+block/2] = radius*cos, radius*sin
	}
}

// double returns one normal of the double-precision path.
func (t *TorchCPU) double() float64 {
	if t.full {
		t.full = false
		return t.cached
	}
	angle, radius := t.uniform53(), t.uniform53()
	radius = math.Sqrt(-2 * math.Log1p(-radius))
	sin, cos := math.Sincos(2 * math.Pi * angle)
	t.cached, t.full = radius*sin, true
	return radius * cos
}

// uniform53 returns a multiple of 2^-53 in [0, 1); the high word is drawn first.
func (t *TorchCPU) uniform53() float64 {
	high := uint64(t.source.Uint32())
	low := uint64(t.source.Uint32())
	return float64((high<<32|low)&(1<<53-1)) / (1 << 53)
}
