package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring"
)

// noOpScorer returns one result at once, which leaves the cost of the pipeline around scoring.
type noOpScorer struct{ result scoring.Result }

func (s noOpScorer) Score(context.Context, scoring.Request) (scoring.Result, error) {
	return s.result, nil
}
func (s noOpScorer) Validate(scoring.Request) error { return nil }

func (s noOpScorer) Rows(scoring.Request) int { return 30 }

// newNoOpScorer returns a scorer whose result is as large as a real one: five components.
func newNoOpScorer() noOpScorer {
	m := scoring.Measurement{
		Estimator: "paide-w2", Value: .1, UpperBound: 1.6, MeanDistance: 1,
		Shares: []float64{.2, .2, .2, .2, .2}, RolloutSteps: 1,
	}
	for i := range 5 {
		row := []float64{1.25, 1.25, 1.25, 1.25, 1.25}
		row[i] = 0
		m.Distances = append(m.Distances, row)
	}
	return noOpScorer{scoring.Result{ClassGap: m, RequestRisk: &m, Receipt: scoring.Receipt{
		EnsembleDigest: fmt.Sprintf("%064d", 1), Profile: scoring.ProfileFixed, Settings: "no-op",
		Steps: 20, GuidanceScale: 2, Noise: "torch-cpu",
		Rows: 30, Runtime: "no-op", Device: "cpu",
	}}}
}

// BenchmarkPipeline measures events a second from the stream to the acknowledgement through everything but the score:
// decode, decide, commit and double ack, with nats-server and PostgreSQL on the same machine. The server does not
// flush to disk, as everywhere in pgtest. The name says how many of a hundred events raise an alert, which the relay
// publishes meanwhile.
func BenchmarkPipeline(b *testing.B) {
	for _, c := range []struct{ inFlight, alertsIn100 int }{{16, 0}, {64, 0}, {256, 0}, {1024, 0}, {256, 5}} {
		b.Run(fmt.Sprintf("in-flight-%d/alerts-in-100-%d", c.inFlight, c.alertsIn100), func(b *testing.B) {
			quiet := slog.New(slog.DiscardHandler)
			js, err := jetstream.New(natstest.Start(b).Connect())
			if err != nil {
				b.Fatal(err)
			}
			store := pgtest.Open(b, postgres.Config{Log: quiet})
			cfg := consumers.Config{Models: []string{faultModel}, MaxInFlight: c.inFlight, Logger: quiet}
			if _, err := consumers.EnsureStream(b.Context(), js, cfg.Stream); err != nil {
				b.Fatal(err)
			}
			for i := range b.N {
				class := 1
				if i%100 < c.alertsIn100 {
					class = 0
				}
				header, payload, err := schema.Encode(schema.Event{
					Source: faultSource, ID: fmt.Sprint(i), Time: time.Now(),
					Data: schema.Generation{Model: faultModel, Class: schema.ClassIndex(class)},
				})
				if err != nil {
					b.Fatal(err)
				}
				msg := &nats.Msg{Subject: schema.SubjectGeneration(faultModel), Header: header, Data: payload}
				if _, err := js.PublishMsgAsync(msg); err != nil {
					b.Fatal(err)
				}
			}
			<-js.PublishAsyncComplete()
			scorer := newNoOpScorer()
			table, err := alerts.NewTable([]schema.Threshold{{
				Model: faultModel, EnsembleDigest: scorer.result.Receipt.EnsembleDigest, Settings: "no-op",
				Measurement: schema.ClassGap,
				Scope:       schema.ScopeClass, Class: new(int), Severity: schema.SeverityWarn, Value: .05,
			}})
			if err != nil {
				b.Fatal(err)
			}
			models := map[string]monitor.Model{faultModel: {Scorer: scorer, Classes: []string{"a", "b"}}}
			m, err := monitor.New(models, tableDecider{table}, app.Recorder{Store: store}, monitor.Config{Log: quiet})
			if err != nil {
				b.Fatal(err)
			}
			sink := alerts.NewStreamSink(js, alerts.StreamConfig{})
			relay, err := alerts.NewRelay(store, alerts.RelayConfig{Logger: quiet}, sink)
			if err != nil {
				b.Fatal(err)
			}
			h := &countingHandler{Monitor: m, left: int64(b.N), done: make(chan struct{})}
			runner, err := consumers.New(js, h, cfg)
			if err != nil {
				b.Fatal(err)
			}
			ctx, stop := context.WithCancel(b.Context())
			var running sync.WaitGroup
			b.ResetTimer()
			running.Go(func() { _ = runner.Run(ctx) })
			running.Go(func() { _ = relay.Run(ctx) })
			<-h.done
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
			stop()
			running.Wait()
		})
	}
}

type tableDecider struct{ table *alerts.Table }

func (d tableDecider) Decide(s schema.Score) alerts.Decision { return alerts.Decide(s, d.table) }

// countingHandler reports when the last event has its verdict.
type countingHandler struct {
	*monitor.Monitor
	left int64
	done chan struct{}
}

func (h *countingHandler) Plan(
	ctx context.Context, ev schema.Event, d schema.Delivery,
) (int, func(context.Context, schema.Delivery) error, error) {
	rows, handle, err := h.Monitor.Plan(ctx, ev, d)
	return rows, func(ctx context.Context, d schema.Delivery) error {
		err := handle(ctx, d)
		if err == nil && atomic.AddInt64(&h.left, -1) == 0 {
			close(h.done)
		}
		return err
	}, err
}
