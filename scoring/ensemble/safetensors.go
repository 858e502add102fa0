package ensemble

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
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
		return nil, fmt.Errorf("safetensors header has %d bytes, at most %d are read", length, min(maxTensorHeader, len(content)-8))
	}
	body := content[8+length:]
	var header map[string]json.RawMessage
	if err := json.Unmarshal(content[8:8+length], &header); err != nil {
		return nil, fmt.Errorf("safetensors header: %w", err)
	}
	tensors := make(map[string]tensor, len(header))
	type span struct{ from, to uint64 }
	var spans []span
	for name, raw := range header {
		if name == "__metadata__" {
			continue
		}
		var entry struct {
			DType   string    `json:"dtype"`
			Shape   []int     `json:"shape"`
			Offsets [2]uint64 `json:"data_offsets"`
		}
		if err := decodeStrict(raw, &entry); err != nil {
			return nil, fmt.Errorf("tensor %q: %w", name, err)
		}
		if entry.DType != "F32" {
			return nil, fmt.Errorf("tensor %q has type %s, must be F32", name, entry.DType)
		}
		elements := uint64(1)
		for _, side := range entry.Shape {
			if side < 1 || uint64(side) > uint64(len(body)) {
				return nil, fmt.Errorf("tensor %q has shape %v", name, entry.Shape)
			}
			if elements *= uint64(side); elements > uint64(len(body)) {
				return nil, fmt.Errorf("tensor %q has shape %v, larger than the file", name, entry.Shape)
			}
		}
		from, to := entry.Offsets[0], entry.Offsets[1]
		if from > to || to > uint64(len(body)) || to-from != 4*elements {
			return nil, fmt.Errorf("tensor %q has data_offsets %v, which do not hold shape %v", name, entry.Offsets, entry.Shape)
		}
		data := make([]float32, elements)
		for i := range data {
			data[i] = math.Float32frombits(binary.LittleEndian.Uint32(body[from+4*uint64(i):]))
		}
		tensors[name] = tensor{entry.Shape, data}
		spans = append(spans, span{from, to})
	}
	slices.SortFunc(spans, func(a, b span) int { return int(int64(a.from) - int64(b.from)) })
	end := uint64(0)
	for _, s := range spans {
		if s.from != end {
			return nil, errors.New("safetensors: tensors overlap or leave a gap")
		}
		end = s.to
	}
	if end != uint64(len(body)) {
		return nil, fmt.Errorf("safetensors: %d bytes belong to no tensor", uint64(len(body))-end)
	}
	return tensors, nil
}

// readTables takes the class embeddings from the tables file.
func (e *Ensemble) readTables(content []byte) error {
	tensors, err := parseSafetensors(content)
	if err != nil {
		return err
	}
	rows := len(e.Classes) + 1
	embedding := []int{e.Context.Dim}
	if e.Context.Tokens > 1 {
		embedding = []int{e.Context.Tokens, e.Context.Dim}
	}
	for name, want := range map[string][]int{
		"tables":    append([]int{e.Components, rows}, embedding...),
		"reference": append([]int{rows}, embedding...),
	} {
		t, ok := tensors[name]
		if !ok {
			if name == "reference" {
				continue
			}
			return fmt.Errorf("tensor %q is missing", name)
		}
		if !slices.Equal(t.shape, want) {
			return fmt.Errorf("tensor %q has shape %v, the manifest needs %v", name, t.shape, want)
		}
		for i, v := range t.data {
			if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
				n := e.Context.Size()
				return fmt.Errorf("tensor %q holds %v at row %d, element %d", name, v, i/n, i%n)
			}
		}
		delete(tensors, name)
		if name == "tables" {
			e.tables = t.data
		} else {
			e.reference = t.data
		}
	}
	for name := range tensors {
		return fmt.Errorf("tensor %q is unknown", name)
	}
	return nil
}
