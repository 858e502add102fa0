# What the numbers of docs/performance.md come from, and the golden files that the sampler's tests read.
BENCH = $(RUN) go test ./cmd/decuwatch -run '^$$' -bench '^BenchmarkTable$$' -benchtime 1x -timeout 2h

.PHONY: bench bench-settings golden

bench: setup ## the table of docs/performance.md; PYTORCH=1 adds the authors' way
	@$(if $(PYTORCH),export DECUWATCH_BENCH_PYTHON="$$(training/setup)/bin/python" &&) $(BENCH)

bench-settings: setup ## settings of ONNX Runtime on this CPU
	@DECUWATCH_BENCH_SETTINGS=1 $(BENCH)
	@$(RUN) go test ./scoring/ort -run '^$$' -bench '^BenchmarkSettings$$'

golden: ## rewrite the golden files with PyTorch and diffusers
	@$(DECUWATCH_TRAIN) golden --arithmetic scoring/testdata/arithmetic.json --sweeps scoring/testdata/sweeps.json \
		--flow scoring/testdata/flow.json --draws scoring/testdata/draws.json \
		ensembles/fashion-mnist $(addprefix scoring/testdata/,tiny tiny-tokens tiny-2 tiny-flow)

# On a CUDA machine: ONNXRUNTIME_LIB must name a CUDA build of ONNX Runtime, GPU_PEAK_TFLOPS the chip's dense matrix
# rate in the precision. PYTORCH=1 adds PyTorch, eager and by torch.compile.
GPU_DEVICE ?= cuda:0
GPU_PRECISION ?= fp16
PAPER_ENSEMBLE = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/decuwatch/paper-size-$(GPU_PRECISION)
GPU_BENCH = DECUWATCH_BENCH_ENSEMBLE="$(PAPER_ENSEMBLE)" DECUWATCH_BENCH_DEVICE="$(GPU_DEVICE)" \
	DECUWATCH_BENCH_GMAC=104 \
	DECUWATCH_BENCH_PEAK_TFLOPS="$(GPU_PEAK_TFLOPS)" DECUWATCH_BENCH_SECONDS=10

.PHONY: bench-gpu

bench-gpu: setup ## the same table on a GPU, with a backbone of the paper's size
	@[ -f "$(PAPER_ENSEMBLE)/ensemble.json" ] || \
		$(DECUWATCH_TRAIN) paper --precision "$(GPU_PRECISION)" --out "$(PAPER_ENSEMBLE)"
	@$(if $(PYTORCH),export DECUWATCH_BENCH_PYTHON="$$(training/setup)/bin/python" \
		DECUWATCH_BENCH_TORCH_ARGS="--paper --device cuda" &&) $(GPU_BENCH) $(BENCH)
	@$(if $(PYTORCH),export DECUWATCH_BENCH_PYTHON="$$(training/setup)/bin/python" \
		DECUWATCH_BENCH_TORCH_ARGS="--paper --device cuda --compile" && $(GPU_BENCH) $(BENCH))
