package consumers

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/decuwatch/decuwatch/internal/backoff"
)

// gate is open while the dependencies of the handler are there. Messages are pulled only while it is open.
type gate struct {
	healthy func(context.Context) error
	log     *slog.Logger
	metrics *Metrics
	ctx     context.Context
	cancel  context.CancelFunc
	probes  sync.WaitGroup
	asking  sync.Mutex // one health check at a time

	mu     sync.Mutex
	opened chan struct{} // closed while the gate is open
	shut   chan struct{} // closed while the gate is shut
	isOpen bool
	trips  int // since the last success
}

// probeTimeout bounds one health check.
const probeTimeout = 5 * time.Second

// Bounds of the time between two health checks.
const (
	probeLeast = 200 * time.Millisecond
	probeMost  = 3 * time.Second
)

func newGate(ctx context.Context, healthy func(context.Context) error, log *slog.Logger, m *Metrics) *gate {
	g := &gate{
		healthy: healthy, log: log, metrics: m, opened: make(chan struct{}), shut: make(chan struct{}), isOpen: true,
	}
	g.ctx, g.cancel = context.WithCancel(ctx)
	close(g.opened)
	return g
}

func (g *gate) stop() {
	g.cancel()
	g.probes.Wait()
}

// wait waits until the gate is open, or returns ctx's error.
func (g *gate) wait(ctx context.Context) error {
	g.mu.Lock()
	opened := g.opened
	g.mu.Unlock()
	select {
	case <-opened:
		return ctx.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// during returns a context that ends with ctx, or as soon as the gate is shut.
func (g *gate) during(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	g.mu.Lock()
	shut := g.shut
	g.mu.Unlock()
	go func() {
		select {
		case <-shut:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// check checks health after a failure and reports whether the gate is open. A gate that it shuts opens by itself when
// the dependencies are back.
func (g *gate) check(ctx context.Context) bool {
	if !g.open() {
		return false
	}
	g.asking.Lock()
	defer g.asking.Unlock()
	if !g.open() {
		return false
	}
	err := g.ask(ctx)
	if err == nil || ctx.Err() != nil {
		return true
	}
	g.shutFor(err)
	return false
}

// trip shuts the gate because of an error that itself says that a dependency is away. If the gate is tripped again
// without a success in between, it stays shut for longer, whatever the health check says.
func (g *gate) trip(err error) {
	g.asking.Lock()
	defer g.asking.Unlock()
	if g.open() && g.ctx.Err() == nil {
		g.shutFor(err)
	}
}

// success resets how long the next trip lasts.
func (g *gate) success() {
	g.mu.Lock()
	g.trips = 0
	g.mu.Unlock()
}

// shutFor shuts the open gate until the dependencies are back. The caller has locked g.asking.
func (g *gate) shutFor(err error) {
	g.mu.Lock()
	g.isOpen = false
	g.opened = make(chan struct{})
	close(g.shut)
	retry := backoff.Backoff{Min: probeLeast, Max: probeMost, Failures: g.trips}
	g.trips++
	g.mu.Unlock()
	g.metrics.paused.Set(1)
	g.log.Warn("pulling is paused: a dependency is away", "err", err)
	g.probes.Go(func() { g.probe(retry) })
}

func (g *gate) open() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.isOpen
}

func (g *gate) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	return g.healthy(ctx)
}

// probe checks health at growing intervals until it succeeds, then opens the gate.
func (g *gate) probe(retry backoff.Backoff) {
	start := time.Now()
	for {
		retry.Wait(g.ctx)
		if g.ctx.Err() != nil {
			return
		}
		if g.ask(g.ctx) == nil {
			break
		}
	}
	g.mu.Lock()
	g.isOpen = true
	close(g.opened)
	g.shut = make(chan struct{})
	g.mu.Unlock()
	g.metrics.paused.Set(0)
	g.log.Info("pulling goes on", "paused", time.Since(start).Round(time.Millisecond))
}
