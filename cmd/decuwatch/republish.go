package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type republishCmd struct {
	Yes      bool               `help:"Really publish them again."`
	NATS     app.NATSConfig     `embed:"" prefix:"nats." group:"NATS"`
	Alerts   alerts.Config      `embed:"" prefix:"alerts." group:"Alerts"`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (republishCmd) Help() string {
	return `Finds alerts and reviewers' verdicts that were published and are not in the stream, as after a loss of NATS, and prints their ids. With --yes, owes them to the stream again: a running worker publishes them with the ids that they had. Those that are older than the stream keeps messages are left out. Exit code 3 if some are missing and --yes was not given.

Examples:

  decuwatch republish
  decuwatch republish --yes`
}

func (c *republishCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if err := c.Postgres.Check(); err != nil {
		return err
	}
	return app.WithServers(ctx, "republish", c.NATS, c.Postgres, log, func(js jetstream.JetStream, store *postgres.Store) error {
		return c.republish(ctx, s, js, store)
	})
}

func (c *republishCmd) republish(ctx context.Context, s *streams, js jetstream.JetStream, store *postgres.Store) error {
	missing, err := unpublished(ctx, js, store, c.Alerts)
	if err != nil {
		return err
	}
	for _, id := range missing {
		fmt.Fprintln(s.out, printable(id))
	}
	switch {
	case len(missing) == 0:
		fmt.Fprintf(s.out, "nothing is missing from the stream %s\n", c.Alerts.Stream)
		return nil
	case !c.Yes:
		fmt.Fprintf(s.out, "%d messages are missing from the stream %s; publish them again with --yes\n", len(missing), c.Alerts.Stream)
		return errDifference
	}
	const atOnce = 1000
	for some := range slices.Chunk(missing, atOnce) {
		if err := store.OweAgain(ctx, some); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(s.out, "%d messages are owed to the stream %s again\n", len(missing), c.Alerts.Stream)
	return err
}

// unpublished returns the ids of messages that were published and that the stream of alerts does not hold.
func unpublished(ctx context.Context, js jetstream.JetStream, store *postgres.Store, c alerts.Config) ([]string, error) {
	within, last := c.MaxAge, uint64(0) // of a stream that is gone
	switch stream, err := js.Stream(ctx, c.Stream); {
	case errors.Is(err, jetstream.ErrStreamNotFound): // made with the first alert
	case err != nil:
		return nil, err
	default:
		within = stream.CachedInfo().Config.MaxAge
	}
	sent, err := store.Sent(ctx, within) // before the stream is read: what is published meanwhile is not missed
	if err != nil {
		return nil, err
	}
	held := map[string]bool{}
	for {
		m, err := consumers.ReadStored(ctx, js, c.Stream, last+1, true)
		if stream := (*jetstream.APIError)(nil); errors.As(err, &stream) && stream.ErrorCode == jetstream.JSErrCodeStreamNotFound {
			break
		}
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		if err != nil {
			return nil, err
		}
		held[nats.Header(m.Header).Get(jetstream.MsgIDHeader)] = true
		last = m.Sequence
	}
	return slices.DeleteFunc(sent, func(id string) bool { return held[id] }), nil
}
