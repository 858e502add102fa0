package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/scoring"
)

// workerOptions are what a worker process of BenchmarkWorkers needs to know.
type workerOptions struct {
	NATS, Key, Postgres string
	Device              time.Duration
}

const workerEnv = "DECUWATCH_DEPLOY_WORKER"

// device replaces an engine: it computes nothing, and takes its time for one request after the other. A worker's
// throughput is then bounded as by a real device, and not by the cores that the processes share.
type device struct {
	mu   sync.Mutex
	wait time.Duration
}

func (d *device) Validate(scoring.Request) error { return nil }

func (d *device) Rows(scoring.Request) int { return 40 }

func (d *device) Score(_ context.Context, r scoring.Request) (scoring.Result, error) {
	if d.wait > 0 {
		d.mu.Lock()
		time.Sleep(d.wait)
		d.mu.Unlock()
	}
	five := make([][]float64, 5)
	for i := range five {
		five[i] = make([]float64, 5)
	}
	m := scoring.Measurement{Estimator: "mean-w2", Value: 0.01, MeanDistance: 0.01, Distances: five,
		Shares: []float64{0.2, 0.2, 0.2, 0.2, 0.2}}
	return scoring.Result{ClassGap: m, RequestRisk: &m, Receipt: scoring.Receipt{
		EnsembleDigest: strings.Repeat("a", 64), Profile: "fixed", Settings: "no-op", Seed: r.Seed, Noise: "torch-cpu",
		Runtime: "none", Device: "none",
	}}, nil
}

type undecided struct{}

func (undecided) Decide(schema.Score) alerts.Decision { return alerts.Decision{} }

type recorder struct{ *postgres.Store }

func (r recorder) Recorded(ctx context.Context, ev schema.Event, d schema.Delivery) (bool, error) {
	known, err := r.Known(ctx, ev.Identity(), d)
	return known, err
}

func (r recorder) Record(ctx context.Context, v schema.Verdict) (monitor.Recorded, error) {
	recorded, err := r.Store.Record(ctx, v)
	return monitor.Recorded{First: recorded.First}, err
}

// work is a worker process: all of the monitor but the engine.
func work(text string) error {
	var o workerOptions
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	key, err := nats.NkeyOptionFromSeed(o.Key)
	if err != nil {
		return err
	}
	nc, err := nats.Connect(o.NATS, key, nats.CustomInboxPrefix("_INBOX_worker"), nats.Timeout(patience))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	store, err := postgres.Open(ctx, postgres.Config{URL: o.Postgres, Log: log})
	if err != nil {
		return err
	}
	defer store.Close()
	models := map[string]monitor.Model{"fashion-mnist": {Scorer: &device{wait: o.Device}, Classes: []string{"a"}}}
	m, err := monitor.New(models, undecided{}, recorder{store}, monitor.Config{Log: log})
	if err != nil {
		return err
	}
	runner, err := consumers.New(js, m, consumers.Config{
		Models: []string{"fashion-mnist"}, Stream: consumers.StreamConfig{MaxBytes: 1 << 30}, MaxInFlight: 64, Logger: log,
	})
	if err != nil {
		return err
	}
	err = runner.Run(ctx)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// BenchmarkWorkers measures how many events a second 1, 2 and 4 worker processes take from one durable consumer to
// their committed verdict and double acknowledgement, on the shipped NATS configuration (flushing each write to disk)
// and a Postgres that flushes too. The scorer computes nothing: at once, or as a device that takes a time for each
// event.
func BenchmarkWorkers(b *testing.B) {
	for _, d := range []time.Duration{0, 10 * time.Millisecond} {
		for _, n := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("device=%s/workers=%d", d, n), func(b *testing.B) {
				for b.Loop() {
					b.ReportMetric(measureWorkers(b, d, n), "events/s")
				}
			})
		}
	}
}

func measureWorkers(b *testing.B, d time.Duration, workers int) float64 {
	dir := secrets(b)
	s := startNATS(b, dir)
	db, err := local.Start(b.Context(), local.Options{Dir: filepath.Join(b.TempDir(), "postgres"), Remove: true})
	if err != nil {
		b.Fatal(err)
	}
	defer db.Stop()
	if err := postgres.Migrate(b.Context(), db.URL()); err != nil {
		b.Fatal(err)
	}
	options, err := json.Marshal(workerOptions{NATS: s.ClientURL(), Key: filepath.Join(dir, "nats-worker.nk"),
		Postgres: db.URL(), Device: d})
	if err != nil {
		b.Fatal(err)
	}
	operator, _ := as(b, s, dir, "operator")
	js, err := jetstream.New(operator)
	if err != nil {
		b.Fatal(err)
	}
	stream, err := consumers.EnsureStream(b.Context(), js, consumers.StreamConfig{MaxBytes: 1 << 30})
	if err != nil {
		b.Fatal(err)
	}
	events := 1500 * workers
	if d == 0 {
		events = 6000
	}
	for i := range events {
		header, payload, err := schema.Encode(schema.Event{
			Source: "//shop/images", ID: fmt.Sprint(i), Time: time.Now().UTC(),
			Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassIndex(0), Seed: uint64(i)},
		})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := js.PublishMsgAsync(&nats.Msg{Subject: schema.SubjectGeneration("fashion-mnist"), Header: header,
			Data: payload}, jetstream.WithStallWait(patience)); err != nil {
			b.Fatal(err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(patience):
		b.Fatal("publishing")
	}
	began := time.Now()
	for range workers {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), workerEnv+"="+string(options))
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.Stdout, cmd.Stderr = io.Discard, os.Stderr
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		defer func() {
			cmd.Process.Signal(syscall.SIGTERM)
			cmd.Wait()
		}()
	}
	// From one tenth to nine tenths, because starting and the last batches must not count.
	acknowledged := func() uint64 {
		consumer, err := stream.Consumer(b.Context(), consumers.Durable("fashion-mnist"))
		if err != nil {
			return 0
		}
		info, err := consumer.Info(b.Context())
		if err != nil {
			return 0
		}
		return uint64(events) - info.NumPending - uint64(info.NumAckPending)
	}
	var from, to time.Time
	var first, last uint64
	for end := began.Add(5 * time.Minute); last < uint64(events)*9/10; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			b.Fatalf("%d of %d events", last, events)
		}
		last, to = acknowledged(), time.Now()
		if first == 0 && last >= uint64(events)/10 {
			first, from = last, to
		}
	}
	return float64(last-first) / to.Sub(from).Seconds()
}
