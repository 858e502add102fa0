package app

import (
	"context"
	"log/slog"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema/postgres"
)

// WithServers calls f with JetStream and the database that a verb works on, and closes both afterwards.
func WithServers(ctx context.Context, verb string, n NATSConfig, p PostgresConfig, log *slog.Logger,
	f func(jetstream.JetStream, *postgres.Store) error,
) error {
	nc, err := n.Connect(verb, false, log)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	store, err := p.Open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()
	return f(js, store)
}

// WithStore runs f on the store.
func WithStore(ctx context.Context, c PostgresConfig, log *slog.Logger, f func(*postgres.Store) error) error {
	store, err := c.Open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()
	return f(store)
}
