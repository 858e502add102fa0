package alerts

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/schema"
)

// Channels on which Postgres announces changes.
const (
	ChannelThresholds = "decuwatch_thresholds"
	ChannelOutbox     = "decuwatch_outbox"
)

// Listener announces changes.
type Listener interface {
	// Listen calls notify after each notification on the channel, and after each time that it began to listen (again),
	// for changes before that were not announced to it. It returns when ctx ends.
	Listen(ctx context.Context, channel string, notify func()) error
}

// ThresholdSource reads the current thresholds.
type ThresholdSource interface {
	Thresholds(ctx context.Context) ([]schema.Threshold, error)
	Listener
}

// Thresholds keeps the current table of thresholds.
type Thresholds struct {
	source  ThresholdSource
	log     *slog.Logger
	metrics *Metrics
	table   atomic.Pointer[Table]
}

// resync is how often thresholds are read although nothing was announced.
const resync = time.Minute

// NewThresholds reads the thresholds and returns them. Run keeps them current. A nil log is slog.Default(), nil
// metrics count nothing.
func NewThresholds(ctx context.Context, source ThresholdSource, log *slog.Logger, m *Metrics) (*Thresholds, error) {
	if log == nil {
		log = slog.Default()
	}
	if m == nil {
		m = NewMetrics(nil, nil, nil)
	}
	t := &Thresholds{source: source, log: log, metrics: m}
	if err := t.read(ctx); err != nil {
		return nil, err
	}
	return t, nil
}

// Table returns the current table.
func (t *Thresholds) Table() *Table { return t.table.Load() }

// Decide holds a score against the current table, as the function [Decide] does.
func (t *Thresholds) Decide(s schema.Score) Decision { return Decide(s, t.Table()) }

// Run reads the thresholds again after each change until ctx ends, and returns nil. While Postgres is away, or if a
// threshold cannot be, the last table stands.
func (t *Thresholds) Run(ctx context.Context) error {
	changed := make(chan struct{}, 1)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return listen(ctx, t.source, ChannelThresholds, changed) })
	group.Go(func() error {
		tick := time.NewTicker(resync)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			case <-tick.C:
			}
			retry := backoff.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
			for {
				err := t.read(ctx)
				if err == nil || ctx.Err() != nil {
					break
				}
				t.log.Warn("thresholds stay as they were", "err", err)
				retry.Wait(ctx)
			}
		}
	})
	return group.Wait()
}

func (t *Thresholds) read(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	table, err := ReadTable(ctx, t.source)
	if err != nil {
		return fmt.Errorf("read thresholds: %w", err)
	}
	if old := t.table.Swap(table); old != nil && (old.Len() != table.Len() || old.last != table.last) {
		t.log.Info("thresholds changed", "thresholds", table.Len())
	}
	t.metrics.setThresholds(table)
	return nil
}

// listen puts a signal into changed for each announcement on a channel, until ctx ends. Several become one.
func listen(ctx context.Context, l Listener, channel string, changed chan<- struct{}) error {
	err := l.Listen(ctx, channel, func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	if ctx.Err() != nil {
		return nil //nolint:nilerr // it has ended as it was asked to
	}
	return err
}
