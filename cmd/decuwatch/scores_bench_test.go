package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// scoresTable writes what users pay for: scores a second, and what a million scores take. A price is of an hour of a
// CPU, or of the GPU; 0 leaves the cost out.
func scoresTable(out io.Writer, cells []*cell, price float64) error {
	hour := "CPU hours"
	if benchDevice != "cpu" {
		hour = "GPU hours"
	}
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	fmt.Fprintf(w, "\n| what | scores/s by the clock | per CPU second | %s a million scores |", hour)
	line := "|---|---|---|---|"
	if price > 0 {
		fmt.Fprintf(w, " cost at %g an hour |", price)
		line += "---|"
	}
	fmt.Fprintf(w, "\n%s\n", line)
	for _, c := range cells {
		if c.unit != "scores/s" {
			continue
		}
		hours := 1e6 / median(compared(c.rates)) / 3600
		fmt.Fprintf(w, "| %s | %.3g | %.3g | %.3g |", c.name, median(walls(c.rates)), median(cpus(c.rates)), hours)
		if price > 0 {
			fmt.Fprintf(w, " %.2f |", price*hours)
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// keeper records verdicts in memory.
type keeper struct{ seen sync.Map }

func (k *keeper) Recorded(_ context.Context, ev schema.Event, _ schema.Delivery) (bool, error) {
	_, known := k.seen.Load(ev.ID)
	return known, nil
}

func (k *keeper) Record(_ context.Context, v schema.Verdict) (monitor.Recorded, error) {
	_, known := k.seen.LoadOrStore(v.Score.Event.ID, true)
	return monitor.Recorded{First: !known}, nil
}

// monitorCell measures the pipeline without servers, 64 events in flight: plan, look up, score, decide, record.
func monitorCell(b *testing.B, e *scoring.Engine, rows func() float64) *cell {
	name := e.Ensemble().Name
	table, err := alerts.NewTable(nil)
	if err != nil {
		b.Fatal(err)
	}
	models := map[string]monitor.Model{name: {Scorer: e, Classes: e.Ensemble().Labels(), Profile: e.Profile()}}
	quiet := monitor.Config{Log: slog.New(slog.DiscardHandler)}
	m, err := monitor.New(models, tableDecider{table}, &keeper{}, quiet)
	if err != nil {
		b.Fatal(err)
	}
	var next atomic.Uint64
	measure := func(d time.Duration) rate {
		ctx, cancel := context.WithCancel(b.Context())
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for ctx.Err() == nil {
					n := next.Add(1)
					ev := schema.Event{
						Source: "urn:bench", ID: strconv.FormatUint(n, 10), Time: time.Now().UTC(),
						Data: schema.Generation{
							Model: name, Class: schema.ClassIndex(int(n) % len(e.Ensemble().Classes)), Seed: n,
						},
					}
					d := schema.Delivery{Stream: "bench", Sequence: n, Time: time.Now(), Delivered: 1}
					_, handle, err := m.Plan(ctx, ev, d)
					if err == nil {
						err = handle(ctx, d)
					}
					if err != nil && !errors.Is(err, context.Canceled) {
						b.Error(err)
						return
					}
				}
			})
		}
		defer wg.Wait()
		defer cancel()
		time.Sleep(d / 4)
		meter := startMeter(rows)
		time.Sleep(d)
		return meter.rate()
	}
	return &cell{name: "pipeline without NATS and PostgreSQL", unit: "rows/s", measure: measure}
}
