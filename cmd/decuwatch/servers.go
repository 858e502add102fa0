package main

import (
	"context"
	"log/slog"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema/postgres"
)

// withServers calls f with JetStream and the database that a verb works on, and closes both afterwards.
func withServers(ctx context.Context, verb string, n NATSConfig, p PostgresConfig, log *slog.Logger,
	f func(jetstream.JetStream, *postgres.Store) error,
) error {
	nc, err := n.connect(verb, false, log)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	store, err := postgres.Open(ctx, p.config(log))
	if err != nil {
		return err
	}
	defer store.Close()
	return f(js, store)
}
