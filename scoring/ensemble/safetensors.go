package ensemble

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// maxTensorHeader bounds the JSON header of a safetensors file.
const maxTensorHeader = 1 << 20

// tensor is one float32 tensor of a safetensors file.
type tensor struct {
	shape []int
	data  []float32
}

// parseSafetensors reads the float32 tensors of a safetensors file: eight bytes of header length, a JSON header of
// {name: {dtype, shape, data_offsets}}, then the numbers, little-endian. Other types, gaps and overlaps are refused.
// Reference: https://github.com/huggingface/safetensors#format
func parseSafetensors(content []byte) (map[string]tensor, error) {
	if len(content) < 8 {
		return nil, errors.New("not a safetensors file: shorter than 8 bytes")
	}
	length := binary.LittleEndian.Uint64(content)
	if length > maxTensorHeader || length > uint64(len(content)-8) {
		return nil, fmt.Errorf("safetensors header has %d bytes, at most %d are read", length,
			min(maxTensorHeader, len(content)-8))
	}
	body := content[8+length:]
	var header map[string]jsontext.Value
	if err := json.Unmarshal(content[8:8+length], &header); err != nil {
		return nil, fmt.Errorf("safetensors header: %w", err)
	}
	delete(header, "__metadata__")
	tensors := make(map[string]tensor, len(header))
	var spans []span
	for name, raw := range header {
		var e tensorEntry
		err := decodeStrict(raw, &e, "")
		if err == nil {
			tensors[name], err = e.read(body)
		}
		if err != nil {
			return nil, fmt.Errorf("tensor %q %w", name, err)
		}
		spans = append(spans, e.Offsets)
	}
	return tensors, checkSpans(spans, uint64(len(body)))
}

// span is where the numbers of a tensor begin and end, in bytes.
type span [2]uint64

// tensorEntry is what the header says of a tensor.
type tensorEntry struct {
	DType   string `json:"dtype"`
	Shape   []int  `json:"shape"`
	Offsets span   `json:"data_offsets"`
}

// read takes the tensor from the numbers of the file.
func (e *tensorEntry) read(body []byte) (tensor, error) {
	if e.DType != "F32" {
		return tensor{}, fmt.Errorf("has type %s, must be F32", e.DType)
	}
	elements := uint64(1)
	for _, side := range e.Shape {
		if side < 1 || uint64(side) > uint64(len(body)) {
			return tensor{}, fmt.Errorf("has shape %v", e.Shape)
		}
		if elements *= uint64(side); elements > uint64(len(body)) {
			return tensor{}, fmt.Errorf("has shape %v, larger than the file", e.Shape)
		}
	}
	from, to := e.Offsets[0], e.Offsets[1]
	if from > to || to > uint64(len(body)) || to-from != 4*elements {
		return tensor{}, fmt.Errorf("has data_offsets %v, which do not hold shape %v", e.Offsets, e.Shape)
	}
	data := make([]float32, elements)
	for i := range data {
		data[i] = math.Float32frombits(binary.LittleEndian.Uint32(body[from+4*uint64(i):]))
	}
	return tensor{e.Shape, data}, nil
}

// checkSpans returns an error unless the spans fill the length.
func checkSpans(spans []span, length uint64) error {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a[0], b[0]) })
	end := uint64(0)
	for _, s := range spans {
		if s[0] != end {
			return errors.New("safetensors: tensors overlap or leave a gap")
		}
		end = s[1]
	}
	if end != length {
		return fmt.Errorf("safetensors: %d bytes belong to no tensor", length-end)
	}
	return nil
}
