# What the numbers of docs/performance.md come from, and the golden files that the sampler's tests read.
BENCH = $(RUN) go test ./cmd/decuwatch -run '^$$' -bench '^BenchmarkTable$$' -benchtime 1x -timeout 2h

.PHONY: bench bench-settings golden

# PYTORCH= leaves out the authors' way, and with it an environment of 6 GB. PRICE is of an hour of a CPU, or of the GPU.
PYTORCH ?= 1
PRICE ?= 0.04
export DECUWATCH_BENCH_PRICE = $(PRICE)

bench: setup ## the tables of docs/performance.md, beside the authors' way in PyTorch
	@$(if $(PYTORCH),export DECUWATCH_BENCH_PYTHON="$$(training/setup)/bin/python" &&) $(BENCH)

bench-settings: setup ## settings of ONNX Runtime on this CPU
	@DECUWATCH_BENCH_SETTINGS=1 $(BENCH)
	@$(RUN) go test ./scoring/ort -run '^$$' -bench '^BenchmarkSettings$$'

golden: ## rewrite the golden files with PyTorch and diffusers
	@$(DECUWATCH_TRAIN) golden --arithmetic scoring/testdata/arithmetic.json --sweeps scoring/testdata/sweeps.json \
		--flow scoring/testdata/flow.json --draws scoring/testdata/draws.json \
		ensembles/fashion-mnist $(addprefix scoring/testdata/,tiny tiny-tokens tiny-2 tiny-flow)

# A backbone of the paper's size on this machine's GPU: ONNXRUNTIME_LIB must name a CUDA build of ONNX Runtime.
GPU_DEVICE ?= cuda:0
GPU_PRECISION ?= fp16
GPU_PEAK_TFLOPS ?= 989
PAPER_ENSEMBLE = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/decuwatch/paper-size-$(GPU_PRECISION)

.PHONY: bench-gpu gpu-kit gpu-rehearsal

bench-gpu: setup ## the same tables on a GPU, with a backbone of the paper's size
	@[ -f "$(PAPER_ENSEMBLE)/ensemble.json" ] || \
		$(DECUWATCH_TRAIN) paper --precision "$(GPU_PRECISION)" --out "$(PAPER_ENSEMBLE)"
	@DECUWATCH_BENCH_ENSEMBLE="$(PAPER_ENSEMBLE)" DECUWATCH_BENCH_DEVICE="$(GPU_DEVICE)" DECUWATCH_BENCH_SESSIONS=2 \
		DECUWATCH_BENCH_GMAC=104 DECUWATCH_BENCH_PEAK_TFLOPS="$(GPU_PEAK_TFLOPS)" DECUWATCH_BENCH_TORCH_RAW=1 \
		DECUWATCH_BENCH_TORCH_ARGS="--paper --device cuda --precision $(GPU_PRECISION)" \
		$(if $(PYTORCH),DECUWATCH_BENCH_PYTHON="$$(training/setup)/bin/python") $(BENCH)

gpu-kit: setup ## what a GPU machine without a network lacks, in .gpu-kit/
	@$(RUN) scripts/gpu-kit

gpu-rehearsal: setup ## every stage of scripts/gpu-check on the CPU, without a network
	@work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && \
	GPU_ARCH=cpu GPU_KIT="$$work/kit" $(RUN) scripts/gpu-kit && \
	export GPU_DEVICE=cpu GPU_CHECK_DIR="$$work/there" PYTHON="$$(training/setup)/bin/python" \
		GPU_PAPER_ARGS="--precision fp32 --channels 32" GPU_BENCH_SECONDS=0.2 GPU_BENCH_ROUNDS=1 && \
	for stage in assemble correct speed; do \
		unshare --map-root-user --net "$$work/kit/gpu-check" $$stage || exit 1; \
	done
