# What the numbers of docs/performance.md come from, and the golden files that the sampler's tests read.
BENCH = $(RUN) go test ./cmd/decuwatch -run '^$$' -bench '^BenchmarkTable$$' -benchtime 1x -timeout 2h

.PHONY: bench bench-settings golden

bench: setup ## the table of docs/performance.md; PYTORCH=1 adds the authors' way
	@$(if $(PYTORCH),export DECUWATCH_BENCH_PYTHON="$$(training/setup)/bin/python" &&) $(BENCH)

bench-settings: setup ## settings of ONNX Runtime on this CPU
	@DECUWATCH_BENCH_SETTINGS=1 $(BENCH)

golden: ## rewrite the golden files with PyTorch and diffusers
	@$(DECUWATCH_TRAIN) golden --arithmetic scoring/testdata/arithmetic.json ensembles/fashion-mnist scoring/testdata/tiny scoring/testdata/tiny-tokens
