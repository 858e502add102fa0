package app

import (
	"context"
	"log/slog"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// WithServers calls f with JetStream and the database that a verb works on, and closes both afterwards.
func WithServers(ctx context.Context, verb string, n NATSConfig, p PostgresConfig, log *slog.Logger,
	f func(jetstream.JetStream, *postgres.Store) error,
) error {
	return WithNATS(verb, n, log, func(js jetstream.JetStream) error {
		return WithStore(ctx, p, log, func(store *postgres.Store) error { return f(js, store) })
	})
}

// WithNATS calls f with JetStream, and closes the connection afterwards.
func WithNATS(verb string, c NATSConfig, log *slog.Logger, f func(jetstream.JetStream) error) error {
	nc, err := c.Connect(verb, false, log)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	return f(js)
}

// WithStore calls f with the database, and closes it afterwards.
func WithStore(ctx context.Context, c PostgresConfig, log *slog.Logger, f func(*postgres.Store) error) error {
	store, err := c.Open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()
	return f(store)
}

// EnsureEvents creates the stream of events if it does not exist. If there is no room for it, the error explains which
// settings ask for the room.
func EnsureEvents(ctx context.Context, js jetstream.JetStream, c consumers.StreamConfig, a alerts.Config) error {
	_, err := consumers.EnsureStream(ctx, js, c)
	return ExplainRoom(ctx, js, c, a, err)
}
