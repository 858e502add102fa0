package app

import (
	"context"
	"log/slog"
	"time"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// whenBack calls get until Postgres answers it, and returns what get returns then. Each attempt that finds Postgres
// away is logged and passed to note. Another error, or the end of ctx, ends the wait.
func whenBack[T any](ctx context.Context, log *slog.Logger, note func(error), get func() (T, error)) (T, error) {
	for retry := (backoff.Backoff{Min: 500 * time.Millisecond, Max: 10 * time.Second}); ; {
		got, err := get()
		if err == nil || !postgres.Away(err) || ctx.Err() != nil {
			return got, err
		}
		note(err)
		wait := retry.Next()
		log.Warn("Postgres is away, trying again", "attempt", retry.Failures, "in", wait, "err", err)
		backoff.Sleep(ctx, wait)
	}
}

// openStore opens the store for a verb that keeps running, and waits while Postgres is away. If the settings say so, it
// creates and upgrades the tables first.
func openStore(ctx context.Context, c PostgresConfig, log *slog.Logger, note func(error), sinks ...schema.Sink,
) (*postgres.Store, error) {
	return whenBack(ctx, log, note, func() (*postgres.Store, error) {
		if err := c.migrate(ctx, log); err != nil {
			return nil, err
		}
		return c.Open(ctx, log, sinks...)
	})
}
