package consumers_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
)

// BenchmarkSuspects measures events a second of messages whose workers were killed before. The ladder is the time that
// handling takes.
func BenchmarkSuspects(b *testing.B) {
	for _, takes := range []time.Duration{0, 10 * time.Millisecond, 100 * time.Millisecond} {
		b.Run(fmt.Sprint("handled-in-", takes), func(b *testing.B) {
			s := natstest.Start(b)
			js := s.JetStream()
			cfg := config()
			ctx, cancel := context.WithCancel(b.Context())
			ran := make(chan error, 1)
			runner := newRunner(b, js, cfg, newRecorder())
			go func() { ran <- runner.Run(ctx) }()
			natstest.Until(b, "the consumer is there", func() bool {
				_, err := js.Consumer(b.Context(), "GENERATION", consumers.Durable(model))
				return err == nil
			})
			cancel()
			if err := <-ran; err != nil {
				b.Fatal(err)
			}
			publishMany(b, js, b.N)
			nc := s.Connect()
			for range 6 {
				for left := b.N; left > 0; left -= min(left, 1000) {
					takeAndSay(b, nc, min(left, 1000), "-NAK")
				}
			}
			h := &counting{want: int64(b.N), takes: takes, done: make(chan struct{})}
			runner = newRunner(b, js, cfg, h)
			b.ResetTimer()
			go func() { _ = runner.Run(b.Context()) }()
			<-h.done
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}
