package postgres_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
)

// BenchmarkRecord commits scores from so many goroutines at a time, on a server that flushes to disk.
func BenchmarkRecord(b *testing.B) {
	ctx := testContext(b)
	server, err := local.Start(ctx, local.Options{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer server.Stop()
	if err := postgres.Migrate(ctx, server.URL()); err != nil {
		b.Fatal(err)
	}
	s, err := postgres.Open(ctx, postgres.Config{URL: server.URL()})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	var n atomic.Uint64
	for _, callers := range []int{1, 8, 64, 512} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			b.SetParallelism((callers + 1) / 2)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					i := n.Add(1)
					v := scoreVerdict(i, fmt.Sprint("event-", i))
					v.Score.ClassIndex = int(i % 100)
					if _, err := s.Record(b.Context(), v); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "scores/s")
		})
	}
}
