package diffusion

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Number types of a draw and of a stored latent.
const (
	Float16  = "float16"
	BFloat16 = "bfloat16"
	Float32  = "float32"
	Float64  = "float64"
)

// Draw says how a producer drew the numbers of one image. The zero value is a draw of float32 for this image alone, by
// a generator that was just seeded.
type Draw struct {
	Dtype  string // number type of the draw; "" means float32
	GPU    GPU    // of torch-cuda
	Offset uint64 // of torch-cuda's generator when the draw began, as torch.Generator.get_offset says
	Batch  Batch
}

// GPU is what the order of torch-cuda's numbers depends on. The zero value is an unknown GPU.
type GPU struct {
	SMs          int // streaming multiprocessors: multi_processor_count of torch.cuda.get_device_properties
	ThreadsPerSM int // that are resident at most: max_threads_per_multi_processor
}

// Batch says which image of those drawn together is meant. The zero value is an image that was drawn alone.
type Batch struct {
	Index int // from 0
	Size  int
}

// Bounds of a draw.
const (
	MaxSMs          = 4096
	MaxThreadsPerSM = 8192
	blockThreads    = 256     // threads of a block in PyTorch's kernels
	MaxDraw         = 1 << 24 // numbers of one draw, of all its images
)

// images returns how many images are drawn together.
func (d Draw) images() int { return max(1, d.Batch.Size) }

// check returns an error that says why a generator cannot repeat the draw of size numbers for each image.
func (d Draw) check(generator string, size int) error {
	dtypes := []string{"", Float32, Float64, Float16, BFloat16}
	switch generator {
	case "torch-cpu":
		if d.Dtype == Float16 || d.Dtype == BFloat16 {
			return fmt.Errorf("%w: torch-cpu draws %s differently from one version of PyTorch to another", ErrNoiseDraw, d.Dtype)
		}
	case "decuwatch":
		dtypes = []string{"", Float32, Float16, BFloat16}
	}
	if !slices.Contains(dtypes, d.Dtype) {
		return fmt.Errorf("%w: %s draws %s, not %q", ErrNoiseDraw, generator, strings.Join(dtypes[1:], ", "), d.Dtype)
	}
	if d.Batch != (Batch{}) && (d.Batch.Index < 0 || d.Batch.Index >= d.Batch.Size) {
		return fmt.Errorf("%w: batch index is %d, must be 0 to %d", ErrNoiseDraw, d.Batch.Index, d.Batch.Size-1)
	}
	if d.images() > MaxDraw/size {
		return fmt.Errorf("%w: %d numbers for each of %d images, at most %d together", ErrNoiseSize, size, d.images(),
			MaxDraw)
	}
	if generator == "torch-cuda" {
		return d.checkGPU(size * d.images())
	}
	if d.Offset != 0 || d.GPU != (GPU{}) {
		return fmt.Errorf("%w: only torch-cuda has a GPU and an offset, not %s", ErrNoiseDraw, generator)
	}
	return nil
}

// checkGPU checks what torch-cuda reads, for a draw of n numbers.
func (d Draw) checkGPU(n int) error {
	g := d.GPU
	switch {
	case d.Offset%4 != 0:
		return fmt.Errorf("%w: offset is %d, must be a multiple of 4", ErrNoiseDraw, d.Offset)
	case g == (GPU{}) && n > MaxTorchCUDA:
		return fmt.Errorf("%w: %d numbers of torch-cuda, at most %d without the GPU's SMs and threads per SM",
			ErrNoiseSize, n, MaxTorchCUDA)
	case g == (GPU{}):
		return nil
	case g.SMs < 1 || g.SMs > MaxSMs:
		return fmt.Errorf("%w: the GPU has %d SMs, must be 1 to %d", ErrNoiseDraw, g.SMs, MaxSMs)
	case g.ThreadsPerSM < blockThreads || g.ThreadsPerSM > MaxThreadsPerSM:
		return fmt.Errorf("%w: the GPU has %d threads per SM, must be %d to %d", ErrNoiseDraw, g.ThreadsPerSM, blockThreads,
			MaxThreadsPerSM)
	}
	return nil
}

// round rounds numbers to a type and keeps them as float32.
func round(values []float32, dtype string) {
	switch dtype {
	case Float16:
		for i, v := range values {
			values[i] = FromFloat16(toFloat16(v))
		}
	case BFloat16:
		for i, v := range values {
			values[i] = FromBFloat16(toBFloat16(v))
		}
	}
}

// FromBFloat16 returns the number that the bits of a bfloat16 stand for.
func FromBFloat16(bits uint16) float32 { return math.Float32frombits(uint32(bits) << 16) }

// toBFloat16 rounds a finite number to the nearest bfloat16, ties to even.
func toBFloat16(v float32) uint16 {
	bits := math.Float32bits(v)
	return uint16((bits + 0x7fff + bits>>16&1) >> 16)
}

// FromFloat16 returns the number that the bits of an IEEE 754 binary16 stand for.
func FromFloat16(bits uint16) float32 {
	sign := float32(1)
	if bits>>15 == 1 {
		sign = -1
	}
	exponent, fraction := int(bits>>10&0x1f), float32(bits&0x3ff)
	switch exponent {
	case 0:
		return float32(math.Copysign(float64(fraction)*0x1p-24, float64(sign)))
	case 0x1f:
		if fraction != 0 {
			return float32(math.NaN())
		}
		return sign * float32(math.Inf(1))
	}
	return sign * float32(math.Ldexp(float64(1+fraction/1024), exponent-15))
}

// toFloat16 rounds a finite number to the nearest binary16, ties to even.
func toFloat16(v float32) uint16 {
	sign := uint16(math.Float32bits(v) >> 16 & 0x8000)
	a := math.Abs(float64(v))
	_, exponent := math.Frexp(a)                // a is below 2^exponent
	unit := max(exponent-11, -24)               // power of two of the last place
	n := math.RoundToEven(math.Ldexp(a, -unit)) // in units of the last place, at most 2048
	if unit == -24 || n == 0 {                  // subnormal, or the smallest binade: the bits count units
		return sign | uint16(n)
	}
	if a = math.Ldexp(n, unit); a > 65504 {
		return sign | 0x7c00
	}
	return sign | uint16(int(n)+(unit+24)<<10) // n has its leading one, which adds one to the exponent's field
}
