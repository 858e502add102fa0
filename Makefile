# decuwatch. `make help` lists the targets. They need Linux with Go 1.26, Python 3.11, make and git.
SHELL := /bin/sh
.DEFAULT_GOAL := help
RUN := scripts/env
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
REVISION := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)

-include training/training.mk
-include schema/schema.mk
-include scoring/bench.mk
-include deploy/deploy.mk
-include review/review.mk
-include internal/faults/faults.mk

.PHONY: help setup build demo clean-demo test shells lint fmt release

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## get what is missing: ONNX Runtime, PostgreSQL, a C compiler
	@scripts/setup

build: setup ## build bin/decuwatch
	@[ -x bin/decuwatch ] || echo "building bin/decuwatch: the first time takes minutes" >&2
	@$(RUN) go build -v -ldflags '-X main.version=$(VERSION) -X main.revision=$(REVISION)' -o bin/decuwatch ./cmd/decuwatch

demo: build ## the monitor end to end on this machine: 200 real requests, scores, alerts
	@$(RUN) bin/decuwatch demo

clean-demo: ## remove the demo's data
	@[ ! -e .decuwatch/lock ] || flock --nonblock .decuwatch/lock true || \
		{ echo "a demo runs in .decuwatch: end it first" >&2; exit 1; }
	@rm -rf .decuwatch

test: setup review-tools shells lint ## everything in Go: race detector, real NATS, Postgres and ensemble
	$(RUN) go test -race -timeout 30m ./...

shells:
	@scripts/fetch-shells

release: setup ## programs, SBOMs and the Python wheel of a release, in dist/
	@$(RUN) scripts/release

lint: setup ## gofmt, vet, staticcheck, and what scripts/lint checks
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	[ -z "$$unformatted" ] || { echo "gofmt would change: $$unformatted" >&2; exit 1; }
	$(RUN) go vet ./...
	$(RUN) go tool staticcheck ./...
	cd scripts/lint && go vet ./... && go test -count=1 ./... && go build -o ../../.tools/lint .
	$(RUN) go vet -vettool=.tools/lint ./...

fmt: ## format the Go code
	@gofmt -w $$(git ls-files '*.go')
