package diffusion

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
)

// kernelDraw is PyTorch's distribution kernel, thread by thread: each makes as many calls as the grid-stride loop has
// rounds, and writes every normal that lies inside the draw.
func kernelDraw(seed uint64, g GPU, offset uint64, n, normals int) []float64 {
	blocks := min(g.SMs*(g.ThreadsPerSM/256), (n+255)/256)
	all := blocks * 256
	out := make([]float64, n)
	for thread := range all {
		call := offset / 4
		rounds := ((n-1)/(all*normals) + 1) * all * normals
		for linear := thread; linear < rounds; linear += all * normals {
			words := philox4x32([4]uint32{uint32(call), uint32(call >> 32), uint32(thread)},
				[2]uint32{uint32(seed), uint32(seed >> 32)})
			call++
			for k := range normals {
				if at := linear + all*k; at < n {
					if normals == 2 {
						out[at] = normalDouble(words, k)
					} else {
						out[at] = float64([]float32{normalSingle(words[0], words[1], 0), normalSingle(words[0], words[1], 1),
							normalSingle(words[2], words[3], 2), normalSingle(words[2], words[3], 3)}[k])
					}
				}
			}
		}
	}
	return out
}

// Every size around the boundaries of the kernel, on several GPUs, whole and in parts, has the numbers of the kernel.
func TestTorchCUDAFollowsTheKernel(t *testing.T) {
	for _, g := range []GPU{{1, 256}, {3, 512}, {1, 1536}, {2, 700}} {
		threads := g.SMs * (g.ThreadsPerSM / 256) * 256
		for _, around := range []int{1, 256, threads, 2 * threads, 3 * threads, 4 * threads, 8 * threads, 9 * threads} {
			for n := max(1, around-1); n <= around+1; n++ {
				for _, dtype := range []string{Float32, Float64} {
					normals, offset := map[string]int{Float32: 4, Float64: 2}[dtype], uint64(4*n)
					noise, err := NewNoise("torch-cuda", 42, n, Draw{Dtype: dtype, GPU: g, Offset: offset})
					if err != nil {
						t.Fatal(err)
					}
					have := make([]float32, n)
					for range 2 { // the second draw begins where the first one ended
						noise.Draw(have)
						for i, want := range kernelDraw(42, g, offset, n, normals) {
							if have[i] != float32(want) {
								t.Fatalf("%v, %s, %d numbers, offset %d: element %d is %v, want %v", g, dtype, n, offset, i, have[i], want)
							}
						}
						offset += uint64((n-1)/(heldThreads(g, n)*normals)+1) * 4
					}
				}
			}
		}
	}
}

// heldThreads returns how many threads a draw of n numbers has.
func heldThreads(g GPU, n int) int { return 256 * min(g.SMs*(g.ThreadsPerSM/256), (n+255)/256) }

// An image of a batch is a part of one draw, of whichever generator, size and type.
func TestImagesOfABatchArePartsOfOneDraw(t *testing.T) {
	gpu := GPU{SMs: 3, ThreadsPerSM: 512}
	for _, c := range []struct {
		generator, dtype string
		gpu              GPU
	}{
		{"torch-cpu", Float32, GPU{}}, {"torch-cpu", Float64, GPU{}}, {"decuwatch", Float32, GPU{}},
		{"decuwatch", Float16, GPU{}}, {"decuwatch", BFloat16, GPU{}}, {"torch-cuda", Float32, gpu},
		{"torch-cuda", Float16, gpu}, {"torch-cuda", BFloat16, gpu}, {"torch-cuda", Float64, gpu},
		{"torch-cuda", Float32, GPU{}},
	} {
		for _, size := range []int{1, 3, 5, 15, 16, 17, 40, 100, 999, 1600} {
			for _, images := range []int{1, 2, 3, 5} {
				whole, err := NewNoise(c.generator, 7, size*images, Draw{Dtype: c.dtype, GPU: c.gpu})
				if err != nil {
					t.Fatal(err)
				}
				parts := make([]Noise, images)
				for k := range parts {
					if parts[k], err = NewNoise(c.generator, 7, size, Draw{c.dtype, c.gpu, 0, Batch{k, images}}); err != nil {
						t.Fatal(err)
					}
				}
				all, part := make([]float32, size*images), make([]float32, size)
				for draw := range 3 {
					whole.Draw(all)
					for k, p := range parts {
						if p.Draw(part); !slices.Equal(part, all[k*size:(k+1)*size]) {
							t.Fatalf("%+v, %d numbers for each of %d images: image %d of draw %d differs", c, size, images, k, draw)
						}
					}
				}
			}
		}
	}
}

// Only torch-cuda depends on the GPU for draws of many numbers.
func TestLargeDrawsOfOtherGenerators(t *testing.T) {
	for _, generator := range []string{"torch-cpu", "decuwatch"} {
		for _, d := range []Draw{{}, {Batch: Batch{Index: 2, Size: 3}}} {
			if _, err := NewNoise(generator, 1, 1<<16, d); err != nil {
				t.Errorf("%s, %+v: %v", generator, d, err)
			}
		}
	}
}

func TestDrawsThatCannotBeRepeated(t *testing.T) {
	h100 := GPU{SMs: 132, ThreadsPerSM: 2048}
	for _, c := range []struct {
		name, generator string
		size            int
		draw            Draw
		want            error
	}{
		{"float16 on the CPU", "torch-cpu", 64, Draw{Dtype: Float16}, ErrNoiseDraw},
		{"bfloat16 on the CPU", "torch-cpu", 64, Draw{Dtype: BFloat16}, ErrNoiseDraw},
		{"another type", "torch-cuda", 64, Draw{Dtype: "int8"}, ErrNoiseDraw},
		{"float64 of our own", "decuwatch", 64, Draw{Dtype: Float64}, ErrNoiseDraw},
		{"a GPU on the CPU", "torch-cpu", 64, Draw{GPU: h100}, ErrNoiseDraw},
		{"an offset on the CPU", "torch-cpu", 64, Draw{Offset: 4}, ErrNoiseDraw},
		{"an offset between calls", "torch-cuda", 64, Draw{Offset: 3}, ErrNoiseDraw},
		{"no SMs", "torch-cuda", 64, Draw{GPU: GPU{0, 2048}}, ErrNoiseDraw},
		{"few threads", "torch-cuda", 64, Draw{GPU: GPU{132, 255}}, ErrNoiseDraw},
		{"many SMs", "torch-cuda", 64, Draw{GPU: GPU{MaxSMs + 1, 2048}}, ErrNoiseDraw},
		{"image past the batch", "torch-cpu", 64, Draw{Batch: Batch{2, 2}}, ErrNoiseDraw},
		{"image before the batch", "torch-cpu", 64, Draw{Batch: Batch{-1, 2}}, ErrNoiseDraw},
		{"an unknown GPU", "torch-cuda", MaxTorchCUDA/2 + 1, Draw{Batch: Batch{0, 2}}, ErrNoiseSize},
		{"a large draw", "torch-cuda", MaxDraw/4 + 1, Draw{GPU: h100, Batch: Batch{0, 4}}, ErrNoiseSize},
	} {
		if _, err := NewNoise(c.generator, 1, c.size, c.draw); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if _, err := NewNoise("torch-cuda", 1, MaxDraw, Draw{GPU: h100}); err != nil {
		t.Errorf("the largest latent: %v", err)
	}
}

// torchDraws is ../testdata/draws.json, which make golden writes with PyTorch.
type torchDraws struct {
	Draws []struct {
		Dtype  string `json:"dtype"`
		Seed   string `json:"seed"`
		Size   int    `json:"size"`
		Images int    `json:"images"`
		// Parts are the first and the last number of each image and their sum, draw by draw.
		Parts [][][3]float64 `json:"first_last_sum"`
	} `json:"draws"`
	Rounding struct {
		Float32  []byte `json:"float32"`
		Float16  []byte `json:"float16"`
		BFloat16 []byte `json:"bfloat16"`
	} `json:"rounding"`
}

func readDraws(t *testing.T) torchDraws {
	t.Helper()
	content, err := os.ReadFile("../testdata/draws.json")
	if err != nil {
		t.Fatal(err)
	}
	var d torchDraws
	if err := json.Unmarshal(content, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// torch.randn of a batch on the CPU, in every type that does not depend on PyTorch's version.
func TestBatchesEqualPyTorch(t *testing.T) {
	cases := readDraws(t).Draws
	if len(cases) < 40 {
		t.Fatalf("%d cases", len(cases))
	}
	for _, c := range cases {
		seed, err := strconv.ParseUint(c.Seed, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		for k := range c.Images {
			noise, err := NewNoise("torch-cpu", seed, c.Size, Draw{Dtype: c.Dtype, Batch: Batch{k, c.Images}})
			if err != nil {
				t.Fatal(err)
			}
			have := make([]float32, c.Size)
			for d, parts := range c.Parts {
				noise.Draw(have)
				sum, want := 0.0, parts[k]
				for _, v := range have {
					sum += float64(v)
				}
				if math.Abs(float64(have[0])-want[0]) > 2e-6 || math.Abs(float64(have[c.Size-1])-want[1]) > 2e-6 ||
					math.Abs(sum-want[2]) > 1e-6*(float64(c.Size)+1) {
					t.Errorf("%s, seed %s, image %d of %d of %d numbers, draw %d: %v to %v, sum %v, want %v", c.Dtype, c.Seed, k,
						c.Images, c.Size, d, have[0], have[c.Size-1], sum, want)
				}
			}
		}
	}
}

func TestRoundingEqualsPyTorch(t *testing.T) {
	r := readDraws(t).Rounding
	n := len(r.Float32) / 4
	if n < 1000 || len(r.Float16) != 2*n || len(r.BFloat16) != 2*n {
		t.Fatalf("%d numbers, %s", n, base64.StdEncoding.EncodeToString(r.Float16[:8]))
	}
	for i := range n {
		v := math.Float32frombits(binary.LittleEndian.Uint32(r.Float32[4*i:]))
		if have, want := toFloat16(v), binary.LittleEndian.Uint16(r.Float16[2*i:]); have != want {
			t.Errorf("%v as float16 is %04x, want %04x", v, have, want)
		}
		if have, want := toBFloat16(v), binary.LittleEndian.Uint16(r.BFloat16[2*i:]); have != want {
			t.Errorf("%v as bfloat16 is %04x, want %04x", v, have, want)
		}
	}
	for bits := range 1 << 16 {
		v := FromFloat16(uint16(bits))
		if finite := !math.IsNaN(float64(v)) && !math.IsInf(float64(v), 0); finite && toFloat16(v) != uint16(bits) {
			t.Errorf("%04x is %v as float16, which is %04x", bits, v, toFloat16(v))
		} else if finite != (bits>>10&0x1f != 0x1f) {
			t.Errorf("%04x is %v", bits, v)
		}
	}
}

// cudaVectors is a file that training/torch_cuda.py writes on a GPU.
type cudaVectors struct {
	Reference    string `json:"reference"`
	SMs          int    `json:"sms"`
	ThreadsPerSM int    `json:"threads_per_sm"`
	Cases        []struct {
		Dtype string `json:"dtype"`
		Seed  string `json:"seed"`
		Draws []struct {
			Size        int                `json:"size"`
			Offset      uint64             `json:"offset"`
			OffsetAfter uint64             `json:"offset_after"`
			Elements    map[string]float64 `json:"elements"`
		} `json:"draws"`
	} `json:"cases"`
}

// What PyTorch drew on GPUs: ../testdata/torch-cuda-*.json. The GPU's fast sine and cosine have an absolute error of
// about 2^-21, which the radius multiplies; numbers of 16 bits may round to a neighbor.
func TestTorchCUDAEqualsPyTorch(t *testing.T) {
	files, err := filepath.Glob("../testdata/torch-cuda-*.json")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("no vectors of a GPU: training/torch_cuda.py writes them")
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var v cudaVectors
		if err := json.Unmarshal(content, &v); err != nil {
			t.Fatal(err)
		}
		t.Run(v.Reference, func(t *testing.T) { v.check(t) })
	}
}

func (v cudaVectors) check(t *testing.T) {
	if len(v.Cases) < 50 {
		t.Fatalf("%d cases", len(v.Cases))
	}
	gpu, worst := GPU{v.SMs, v.ThreadsPerSM}, map[string]float64{}
	for _, c := range v.Cases {
		seed, err := strconv.ParseUint(c.Seed, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		noise := NewTorchCUDA(seed, Draw{Dtype: c.Dtype, GPU: gpu, Offset: c.Draws[0].Offset})
		for _, d := range c.Draws {
			at := fmt.Sprintf("%s, seed %s, %d numbers at offset %d", c.Dtype, c.Seed, d.Size, d.Offset)
			have := make([]float32, d.Size)
			if noise.Draw(have); noise.calls*4 != d.OffsetAfter {
				t.Errorf("%s: the offset is %d then, want %d", at, noise.calls*4, d.OffsetAfter)
			}
			for element, want := range d.Elements {
				i, err := strconv.Atoi(element)
				if err != nil {
					t.Fatal(err)
				}
				place := map[string]float64{Float16: 0x1p-10, BFloat16: 0x1p-7}[c.Dtype] * math.Abs(want)
				difference := math.Abs(float64(have[i]) - want)
				if worst[c.Dtype] = max(worst[c.Dtype], difference); !(difference <= 1e-5+place) {
					t.Errorf("%s: element %d is %v, want %v", at, i, have[i], want)
				}
			}
		}
	}
	t.Logf("%d cases, largest differences %v", len(v.Cases), worst)
}
