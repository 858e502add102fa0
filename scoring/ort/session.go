package ort

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	onnx "github.com/yalue/onnxruntime_go"
)

// Config is how a session runs.
type Config struct {
	Device      string // cpu, cuda:N or tensorrt:N
	Threads     int    // within an operator, on cpu; 0 is ONNX Runtime's choice
	MemoryLimit int64  // bytes of GPU memory; 0 is no bound
	HalfWeights bool   // the graph's weights are fp16
	Spinning    bool   // threads spin between operators: a little faster alone, at the cost of the process's other threads
	Rows        int    // of the largest run, for which buffers are allocated and to which TensorRT tunes its engines

	without ablation // measured by BenchmarkSettings
}

// ablation leaves out what makes runs faster.
type ablation struct {
	arena        bool // memory of each run is given back after it
	pattern      bool // memory of a run is planned operator by operator
	optimization bool // only basic graph optimization
	nhwc         bool // channels first on CUDA
}

// Port is one input or output of a graph, with the shape of one row.
type Port struct {
	Name  string
	Shape []int64
}

// Graph is a graph's content and its ports.
type Graph struct {
	Content []byte
	Dir     string // of external data
	Inputs  []Port // float32, except for Timestep
	Output  Port   // float32

	// Timestep names the int64 input of one number a row, or is "".
	Timestep string
}

// Session is one graph with buffers for its inputs and its output, through which one goroutine at a time runs it.
type Session struct {
	graph   Graph
	rows    int
	inputs  [][]float32 // in the order of Graph.Inputs; nil for the timestep
	steps   []int64
	output  []float32
	session *onnx.DynamicAdvancedSession
	options *onnx.RunOptions
	tensors []*tensorSet // by row count - 1, made at the first run of that count and kept
	warm    bool

	mu         sync.Mutex // of what Terminate shares with Run
	running    bool
	terminated bool
}

// tensorSet are views of the buffers' first rows.
type tensorSet struct {
	inputs []onnx.Value
	output []onnx.Value
}

// NewSession loads a graph. Load must have been called.
func NewSession(config Config, graph Graph) (_ *Session, err error) {
	options, err := sessionOptions(config, graph)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, options.Destroy()) }()

	s := &Session{graph: graph, rows: config.Rows, tensors: make([]*tensorSet, config.Rows)}
	names := make([]string, len(graph.Inputs))
	for i, port := range graph.Inputs {
		names[i] = port.Name
		if port.Name == graph.Timestep {
			s.steps = make([]int64, config.Rows)
			s.inputs = append(s.inputs, nil)
			continue
		}
		s.inputs = append(s.inputs, make([]float32, int64(config.Rows)*elements(port)))
	}
	s.output = make([]float32, int64(config.Rows)*elements(graph.Output))
	if s.options, err = onnx.NewRunOptions(); err != nil {
		return nil, fmt.Errorf("create run options: %w", err)
	}
	err = keepSignals(func() error {
		s.session, err = onnx.NewDynamicAdvancedSessionWithONNXData(graph.Content, names, []string{graph.Output.Name},
			options)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("load graph on %s: %w", config.Device, err), s.options.Destroy())
	}
	s.graph.Content = nil // the runtime has its own copy
	return s, nil
}

func elements(port Port) int64 {
	n := int64(1)
	for _, side := range port.Shape {
		n *= side
	}
	return n
}

// Input returns the buffer of float32 input i, row after row.
func (s *Session) Input(i int) []float32 { return s.inputs[i] }

// Timesteps returns the buffer of the timestep input.
func (s *Session) Timesteps() []int64 { return s.steps }

// Output returns the buffer of the output, row after row.
func (s *Session) Output() []float32 { return s.output }

// Run runs the first rows of the buffers, 1 to Config.Rows. It allocates buffers and tensors only at the first run of
// a row count. The error is ErrTerminated if Terminate ended the run.
func (s *Session) Run(rows int) error {
	set := s.tensors[rows-1]
	if set == nil {
		var err error
		if set, err = s.newTensors(rows); err != nil {
			return err
		}
		s.tensors[rows-1] = set
	}
	s.mu.Lock()
	s.running, s.terminated = true, false
	s.mu.Unlock()

	var err error
	if s.warm {
		err = s.session.RunWithOptions(set.inputs, set.output, s.options)
	} else {
		err = keepSignals(func() error { return s.session.RunWithOptions(set.inputs, set.output, s.options) })
		s.warm = err == nil
	}

	s.mu.Lock()
	terminated := s.terminated
	s.running = false
	if terminated {
		err = errors.Join(err, s.options.UnsetTerminate())
	}
	s.mu.Unlock()
	if err != nil && terminated {
		return fmt.Errorf("run of %d rows: %w", rows, ErrTerminated)
	}
	if err != nil {
		return fmt.Errorf("run of %d rows: %w", rows, err)
	}
	return nil
}

// Terminate makes a run in progress end at its next operator. Any goroutine may call it.
func (s *Session) Terminate() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.running || s.terminated {
		return nil
	}
	s.terminated = true
	return s.options.Terminate()
}

func (s *Session) newTensors(rows int) (*tensorSet, error) {
	set := &tensorSet{}
	shape := func(port Port) onnx.Shape {
		return append(onnx.NewShape(int64(rows)), port.Shape...)
	}
	add := func(values *[]onnx.Value, value onnx.Value, err error) error {
		if err == nil {
			*values = append(*values, value)
		}
		return err
	}
	var err error
	for i, port := range s.graph.Inputs {
		if port.Name == s.graph.Timestep {
			var value *onnx.Tensor[int64]
			value, err = onnx.NewTensor(onnx.NewShape(int64(rows)), s.steps)
			err = add(&set.inputs, value, err)
		} else {
			var value *onnx.Tensor[float32]
			value, err = onnx.NewTensor(shape(port), s.inputs[i])
			err = add(&set.inputs, value, err)
		}
		if err != nil {
			break
		}
	}
	if err == nil {
		var value *onnx.Tensor[float32]
		value, err = onnx.NewTensor(shape(s.graph.Output), s.output)
		err = add(&set.output, value, err)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create tensors of %d rows: %w", rows, err), set.destroy())
	}
	return set, nil
}

func (t *tensorSet) destroy() error {
	var errs []error
	for _, value := range append(t.inputs, t.output...) {
		errs = append(errs, value.Destroy())
	}
	return errors.Join(errs...)
}

// Close releases the session. No run may be in progress.
func (s *Session) Close() error {
	var errs []error
	for _, set := range s.tensors {
		if set != nil {
			errs = append(errs, set.destroy())
		}
	}
	s.tensors = nil
	return errors.Join(append(errs, s.session.Destroy(), s.options.Destroy())...)
}

// ParseDevice returns provider and number of a device: cpu, cuda, cuda:N, tensorrt, tensorrt:N.
func ParseDevice(device string) (provider string, number int, err error) {
	provider, index, found := strings.Cut(device, ":")
	if found {
		number, err = strconv.Atoi(index)
	}
	switch {
	case err != nil, number < 0, found && provider == "cpu":
	case provider == "cpu", provider == "cuda", provider == "tensorrt":
		return provider, number, nil
	}
	return "", 0, fmt.Errorf("device is %q, must be cpu, cuda:N or tensorrt:N", device)
}

func sessionOptions(config Config, graph Graph) (_ *onnx.SessionOptions, err error) {
	provider, number, err := ParseDevice(config.Device)
	if err != nil {
		return nil, err
	}
	options, err := onnx.NewSessionOptions()
	if err != nil {
		return nil, fmt.Errorf("create session options: %w", err)
	}
	spinning := "0"
	if config.Spinning {
		spinning = "1"
	}
	level := onnx.GraphOptimizationLevel(onnx.GraphOptimizationLevelEnableAll)
	if config.without.optimization {
		level = onnx.GraphOptimizationLevelEnableBasic
	}
	steps := []error{
		options.SetExecutionMode(onnx.ExecutionModeSequential),
		options.SetGraphOptimizationLevel(level),
		options.SetIntraOpNumThreads(config.Threads),
		options.SetInterOpNumThreads(1),
		options.SetCpuMemArena(!config.without.arena),
		options.SetMemPattern(!config.without.pattern),
		options.AddSessionConfigEntry("session.intra_op.allow_spinning", spinning),
	}
	if graph.Dir != "" {
		steps = append(steps, options.AddSessionConfigEntry("session.model_external_initializers_file_folder_path",
			graph.Dir))
	}
	switch provider {
	case "tensorrt":
		// CUDA takes the operators that TensorRT does not implement.
		steps = append(steps, appendTensorRT(options, config, graph, number), appendCUDA(options, config, number))
	case "cuda":
		steps = append(steps, appendCUDA(options, config, number))
	}
	if err := errors.Join(steps...); err != nil {
		return nil, errors.Join(fmt.Errorf("set up device %s: %w", config.Device, err), options.Destroy())
	}
	return options, nil
}

func appendCUDA(options *onnx.SessionOptions, config Config, number int) (err error) {
	cuda, err := onnx.NewCUDAProviderOptions()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cuda.Destroy()) }()
	settings := map[string]string{
		"device_id":              strconv.Itoa(number),
		"cudnn_conv_algo_search": "HEURISTIC", // a search takes seconds a shape and gains nothing
		"arena_extend_strategy":  "kSameAsRequested",
	}
	if !config.HalfWeights {
		settings["use_tf32"] = "0" // all of fp32's digits; with half weights, this would turn the matrix units off
	}
	if !config.without.nhwc {
		settings["prefer_nhwc"] = "1"
	}
	if config.MemoryLimit > 0 {
		settings["gpu_mem_limit"] = strconv.FormatInt(config.MemoryLimit, 10)
	}
	return errors.Join(cuda.Update(settings), options.AppendExecutionProviderCUDA(cuda))
}

func appendTensorRT(options *onnx.SessionOptions, config Config, graph Graph, number int) (err error) {
	tensorRT, err := onnx.NewTensorRTProviderOptions()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tensorRT.Destroy()) }()
	settings := map[string]string{
		"device_id":              strconv.Itoa(number),
		"trt_profile_min_shapes": profileShapes(graph, 1),
		"trt_profile_opt_shapes": profileShapes(graph, config.Rows),
		"trt_profile_max_shapes": profileShapes(graph, config.Rows),
	}
	if config.HalfWeights {
		settings["trt_fp16_enable"] = "1"
	}
	if config.MemoryLimit > 0 {
		settings["trt_max_workspace_size"] = strconv.FormatInt(config.MemoryLimit, 10)
	}
	return errors.Join(tensorRT.Update(settings), options.AppendExecutionProviderTensorRT(tensorRT))
}

// profileShapes writes the shapes of the inputs as TensorRT's options want them: "latent:8x4x8x8,timestep:8".
func profileShapes(graph Graph, rows int) string {
	var shapes []string
	for _, port := range graph.Inputs {
		sides := []string{strconv.Itoa(rows)}
		for _, side := range port.Shape {
			sides = append(sides, strconv.FormatInt(side, 10))
		}
		shapes = append(shapes, port.Name+":"+strings.Join(sides, "x"))
	}
	return strings.Join(shapes, ",")
}
