package ensemble

import (
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
)

// graph is what a reader must know of an ONNX graph before it is given to a runtime.
type graph struct {
	opset    int64
	inputs   []port
	outputs  []port
	external map[string]bool // locations of external data
}

// port is one input or output; a free dimension is -1.
type port struct {
	name string
	elem int64
	dims []int64
}

// ONNX element types (TensorProto.DataType).
const (
	onnxFloat = 1
	onnxInt64 = 7
)

// maxGraphDepth bounds nested subgraphs.
const maxGraphDepth = 16

// fields calls f for every field of a protobuf message. Length-delimited values come as bytes, varints as a number;
// fixed-width values are skipped.
func fields(message []byte, f func(number protowire.Number, value []byte, varint uint64) error) error {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		var value []byte
		var varint uint64
		switch kind {
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(message)
		case protowire.VarintType:
			varint, n = protowire.ConsumeVarint(message)
		default:
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		if kind == protowire.BytesType || kind == protowire.VarintType {
			if err := f(number, value, varint); err != nil {
				return err
			}
		}
	}
	return nil
}

// parseGraph reads opset, inputs, outputs and external data locations of an ONNX ModelProto.
// Reference: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
func parseGraph(content []byte) (*graph, error) {
	g := &graph{external: map[string]bool{}}
	initialized := map[string]bool{}
	err := fields(content, func(number protowire.Number, value []byte, _ uint64) error {
		switch number {
		case 7: // ModelProto.graph
			return g.readGraph(value, initialized, 0)
		case 8: // ModelProto.opset_import
			var domain string
			var version uint64
			err := fields(value, func(number protowire.Number, value []byte, varint uint64) error {
				switch number {
				case 1:
					domain = string(value)
				case 2:
					version = varint
				}
				return nil
			})
			if domain == "" || domain == "ai.onnx" {
				g.opset = int64(version)
			}
			return err
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("not an ONNX graph: %w", err)
	}
	g.inputs = slices.DeleteFunc(g.inputs, func(p port) bool { return initialized[p.name] })
	if len(g.inputs) == 0 || len(g.outputs) == 0 {
		return nil, errors.New("not an ONNX graph: no inputs or no outputs")
	}
	return g, nil
}

func (g *graph) readGraph(message []byte, initialized map[string]bool, depth int) error {
	if depth > maxGraphDepth {
		return errors.New("subgraphs are nested too deeply")
	}
	return fields(message, func(number protowire.Number, value []byte, _ uint64) error {
		switch number {
		case 1: // node
			return fields(value, func(number protowire.Number, value []byte, _ uint64) error {
				if number != 5 { // NodeProto.attribute
					return nil
				}
				return fields(value, func(number protowire.Number, value []byte, _ uint64) error {
					switch number {
					case 5, 10: // AttributeProto.t, tensors
						return g.readTensor(value, nil)
					case 6, 11: // AttributeProto.g, graphs
						return g.readGraph(value, nil, depth+1)
					case 22, 23: // AttributeProto.sparse_tensor, sparse_tensors
						return g.readSparse(value)
					}
					return nil
				})
			})
		case 5: // initializer
			return g.readTensor(value, initialized)
		case 15: // sparse_initializer
			return g.readSparse(value)
		case 11, 12: // input, output
			if depth > 0 {
				return nil
			}
			p, err := readPort(value)
			if number == 11 {
				g.inputs = append(g.inputs, p)
			} else {
				g.outputs = append(g.outputs, p)
			}
			return err
		}
		return nil
	})
}

func (g *graph) readSparse(message []byte) error {
	return fields(message, func(number protowire.Number, value []byte, _ uint64) error {
		if number == 1 || number == 2 { // SparseTensorProto.values, indices
			return g.readTensor(value, nil)
		}
		return nil
	})
}

func (g *graph) readTensor(message []byte, initialized map[string]bool) error {
	return fields(message, func(number protowire.Number, value []byte, _ uint64) error {
		switch number {
		case 8: // TensorProto.name
			if initialized != nil {
				initialized[string(value)] = true
			}
		case 13: // TensorProto.external_data
			var key, location string
			err := fields(value, func(number protowire.Number, value []byte, _ uint64) error {
				switch number {
				case 1:
					key = string(value)
				case 2:
					location = string(value)
				}
				return nil
			})
			if key == "location" {
				g.external[location] = true
			}
			return err
		}
		return nil
	})
}

func readPort(message []byte) (port, error) {
	var p port
	err := fields(message, func(number protowire.Number, value []byte, _ uint64) error {
		switch number {
		case 1: // ValueInfoProto.name
			p.name = string(value)
		case 2: // ValueInfoProto.type
			return fields(value, func(number protowire.Number, value []byte, _ uint64) error {
				if number != 1 { // TypeProto.tensor_type
					return nil
				}
				return fields(value, func(number protowire.Number, value []byte, varint uint64) error {
					switch number {
					case 1: // elem_type
						p.elem = int64(varint)
					case 2: // shape
						return fields(value, func(number protowire.Number, value []byte, _ uint64) error {
							if number != 1 { // TensorShapeProto.dim
								return nil
							}
							side := int64(-1)
							err := fields(value, func(number protowire.Number, _ []byte, varint uint64) error {
								if number == 1 { // dim_value
									side = int64(varint)
								}
								return nil
							})
							p.dims = append(p.dims, side)
							return err
						})
					}
					return nil
				})
			})
		}
		return nil
	})
	return p, err
}

// check compares the graph with the manifest. Inputs must have exactly the wanted sides and a free row count.
// Exporters may leave sides of an output open; the first run settles those.
func (g *graph) check(opset int, file File, inputs, outputs []port) error {
	if g.opset != int64(opset) {
		return fmt.Errorf("opset is %d, the manifest says %d", g.opset, opset)
	}
	named := map[string]bool{}
	for _, f := range file.External {
		named[f.Path] = true
	}
	for location := range g.external {
		if !named[location] {
			return fmt.Errorf("external data %q is not named by the manifest", location)
		}
	}
	if len(g.inputs) != len(inputs) || len(g.outputs) != len(outputs) {
		return fmt.Errorf("graph has %d inputs and %d outputs, must have %d and %d", len(g.inputs), len(g.outputs),
			len(inputs), len(outputs))
	}
	if err := checkPorts("input", g.inputs, inputs, false); err != nil {
		return err
	}
	return checkPorts("output", g.outputs, outputs, true)
}

func checkPorts(kind string, have, want []port, open bool) error {
	for _, w := range want {
		i := slices.IndexFunc(have, func(p port) bool { return p.name == w.name })
		if i < 0 {
			return fmt.Errorf("graph has no %s %q", kind, w.name)
		}
		h := have[i]
		if h.elem != w.elem {
			return fmt.Errorf("%s %q has element type %d, must be %d (ONNX numbers: 1 is float32, 7 is int64)", kind, w.name,
				h.elem, w.elem)
		}
		fits := len(h.dims) == len(w.dims)
		for j := 0; fits && j < len(w.dims); j++ {
			fits = h.dims[j] == w.dims[j] || open && h.dims[j] == -1
		}
		if !fits {
			return fmt.Errorf("%s %q has shape %v, must be %v (-1 is free)", kind, w.name, h.dims, w.dims)
		}
	}
	return nil
}

func (e *Ensemble) checkUNet(content []byte) error {
	g, err := parseGraph(content)
	if err != nil {
		return err
	}
	latent := []int64{-1, int64(e.Latent.Channels), int64(e.Latent.Height), int64(e.Latent.Width)}
	names, timestep := e.Graph.UNet, int64(onnxInt64)
	if e.Diffusion.Kind == diffusion.KindFlowMatch {
		timestep = onnxFloat
	}
	inputs := []port{
		{names.Latent, onnxFloat, latent},
		{names.Timestep, timestep, []int64{-1}},
		{names.Context, onnxFloat, []int64{-1, int64(e.Context.Tokens), int64(e.Context.Dim)}},
	}
	for _, c := range e.Conditioning {
		dims := []int64{-1}
		for _, side := range c.Shape {
			dims = append(dims, int64(side))
		}
		inputs = append(inputs, port{c.Input, onnxFloat, dims})
	}
	return g.check(e.Opset, e.Files.UNet, inputs, []port{{names.Output, onnxFloat, latent}})
}

func (e *Ensemble) checkDecoder(content []byte) error {
	g, err := parseGraph(content)
	if err != nil {
		return err
	}
	latent := []int64{-1, int64(e.Latent.Channels), int64(e.Latent.Height), int64(e.Latent.Width)}
	image := []int64{-1, int64(e.Image.Channels), int64(e.Image.Height), int64(e.Image.Width)}
	return g.check(e.Opset, e.Files.Decoder,
		[]port{{e.Graph.Decoder.Latent, onnxFloat, latent}}, []port{{e.Graph.Decoder.Output, onnxFloat, image}})
}

func (e *Ensemble) checkJudge(content []byte) error {
	g, err := parseGraph(content)
	if err != nil {
		return err
	}
	return g.check(e.Opset, *e.Files.Judge, e.Judge.inputs(), e.Judge.outputs())
}
