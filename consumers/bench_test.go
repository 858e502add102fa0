package consumers_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// BenchmarkConsume measures how many events a second go from the stream to their acknowledgement. The handler does
// nothing, and server and worker are in one process. The ladder is the number of messages in flight.
func BenchmarkConsume(b *testing.B) {
	for _, inFlight := range []int{1, 16, 64, 256, 1024} {
		b.Run(fmt.Sprintf("in-flight-%d", inFlight), func(b *testing.B) {
			js := natstest.Start(b).JetStream()
			if _, err := consumers.EnsureStream(b.Context(), js, consumers.StreamConfig{}); err != nil {
				b.Fatal(err)
			}
			publishMany(b, js, b.N)
			cfg := config()
			cfg.MaxInFlight = inFlight
			h := &counting{want: int64(b.N), done: make(chan struct{})}
			b.ResetTimer()
			ctx := b.Context()
			runner := newRunner(b, js, cfg, h)
			go func() { _ = runner.Run(ctx) }()
			<-h.done
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

// counting counts the events that it handles.
type counting struct {
	seen  atomic.Int64
	want  int64
	takes time.Duration // for each
	done  chan struct{}
}

func (c *counting) Plan(
	context.Context, schema.Event, schema.Delivery,
) (int, func(context.Context, schema.Delivery) error, error) {
	return 1, func(context.Context, schema.Delivery) error {
		time.Sleep(c.takes)
		if c.seen.Add(1) == c.want {
			close(c.done)
		}
		return nil
	}, nil
}

func (c *counting) DeadLetter(context.Context, schema.Verdict) error { return nil }

func publishMany(b *testing.B, js jetstream.JetStream, n int) {
	b.Helper()
	for i := range n {
		header, payload, err := schema.Encode(event(fmt.Sprint("e", i)))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := js.PublishMsgAsync(&nats.Msg{Subject: schema.SubjectGeneration(model), Header: header,
			Data: payload}); err != nil {
			b.Fatal(err)
		}
	}
	<-js.PublishAsyncComplete()
}
