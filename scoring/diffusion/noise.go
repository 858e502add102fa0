package diffusion

import (
	"errors"
	"fmt"
	"math"

	"gonum.org/v1/gonum/mathext/prng"
)

// ErrUnknownGenerator is returned by NewNoise for an unknown name.
var ErrUnknownGenerator = errors.New("unknown noise generator")

// ErrNoiseSize is returned by NewNoise for a size at which the generator's numbers depend on the producer's device.
var ErrNoiseSize = errors.New("noise depends on the device at this size")

// Noise draws standard normal numbers from a seed, draw after draw, as its producer does.
type Noise interface {
	// Draw fills dst with the next draw. The sizes and the order of draws must be the producer's.
	Draw(dst []float32)
}

// NewNoise returns the generator with the given name, seeded, for draws of size numbers:
//
//   - torch-cpu: torch.randn with a CPU generator
//   - torch-cuda: torch.randn with a CUDA generator, for sizes of at most MaxTorchCUDA
//   - decuwatch: this project's own, see Decuwatch
func NewNoise(name string, seed uint64, size int) (Noise, error) {
	switch name {
	case "torch-cpu":
		return NewTorchCPU(seed), nil
	case "torch-cuda":
		if size > MaxTorchCUDA {
			return nil, fmt.Errorf("torch-cuda: %d numbers, at most %d: %w", size, MaxTorchCUDA, ErrNoiseSize)
		}
		return &TorchCUDA{seed: seed}, nil
	case "decuwatch":
		return &Decuwatch{seed: seed}, nil
	}
	return nil, fmt.Errorf("%w: %q, known are torch-cpu, torch-cuda, decuwatch", ErrUnknownGenerator, name)
}

// TorchCPU draws what torch.randn(n, generator=torch.Generator().manual_seed(seed)) draws, to within a few units in
// the last place of float32: PyTorch computes logarithm, sine and cosine with vector instructions of the CPU at hand.
//
// The numbers come from MT19937 seeded with the low 32 bits of the seed. From 16 numbers on, uniforms of 24 bits fill
// the tensor and Box-Muller turns blocks of 16 into normals, element j with element j+8; a size that 16 does not
// divide draws its last 16 again. Below 16, Box-Muller works in double precision on 53 bits and keeps its second
// number for the next call. Reference: aten/src/ATen/native/cpu/DistributionTemplates.h of PyTorch.
type TorchCPU struct {
	source *prng.MT19937
	cached float64
	full   bool // cached holds a number
}

// NewTorchCPU returns the generator at the given seed.
func NewTorchCPU(seed uint64) *TorchCPU {
	source := prng.NewMT19937()
	source.Seed(seed)
	return &TorchCPU{source: source}
}

// Draw implements Noise.
func (t *TorchCPU) Draw(dst []float32) {
	if len(dst) < 16 {
		for i := range dst {
			dst[i] = float32(t.double())
		}
		return
	}
	t.uniform(dst)
	for i := 0; i+16 <= len(dst); i += 16 {
		boxMuller16(dst[i : i+16])
	}
	if len(dst)%16 != 0 {
		last := dst[len(dst)-16:]
		t.uniform(last)
		boxMuller16(last)
	}
}

// uniform fills dst with multiples of 2^-24 in [0, 1).
func (t *TorchCPU) uniform(dst []float32) {
	for i := range dst {
		dst[i] = float32(t.source.Uint32()&(1<<24-1)) / (1 << 24)
	}
}

// boxMuller16 turns 16 uniforms into normals: the radius comes from 1 minus the first eight, the angle from the
// others.
func boxMuller16(block []float32) {
	for j := range 8 {
		radius := math.Sqrt(-2 * math.Log(float64(1-block[j])))
		sin, cos := math.Sincos(2 * math.Pi * float64(block[j+8]))
		block[j], block[j+8] = float32(radius*cos), float32(radius*sin)
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
