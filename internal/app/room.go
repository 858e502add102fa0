package app

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
)

// ExplainRoom adds to JetStream's refusal of a stream for its size the settings that ask for the size, and what the
// account has left. Other errors stay as they are.
func ExplainRoom(ctx context.Context, js jetstream.JetStream, stream consumers.StreamConfig, sinks alerts.Config,
	err error,
) error {
	if !consumers.NoRoom(err) {
		return err
	}
	has := ""
	ask, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if info, askErr := js.AccountInfo(ask); askErr == nil {
		has = fmt.Sprintf("; streams of this account have reserved %d bytes of disk", info.ReservedStore)
		if info.Limits.MaxStore >= 0 {
			has += fmt.Sprintf(" of %d", info.Limits.MaxStore)
		}
	}
	all := 2*stream.MaxBytes + sinks.MaxBytes + alerts.ProbeBytes
	return fmt.Errorf("%w: new streams ask for %d bytes of events (stream.max-bytes), as many of advisories, and "+
		"%d bytes of alerts (alerts.max-bytes), with probes %d bytes in all%s; lower these settings, or raise "+
		"max_file_store of the NATS server or the account's limit", err, stream.MaxBytes, sinks.MaxBytes, all, has)
}

// ensureOnce creates something in JetStream once NATS is connected, then waits for ctx. It returns early only if there
// is no room. Whatever else fails is logged: the first one who needs it reports it again.
func ensureOnce(
	ctx context.Context, nc *nats.Conn, what string, log *slog.Logger, ensure func(context.Context) error,
) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for !nc.IsConnected() {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	err := ensure(ctx)
	if consumers.NoRoom(err) {
		return err
	}
	if err != nil && ctx.Err() == nil {
		log.Warn("cannot create the "+what+" yet", "err", err)
	}
	<-ctx.Done()
	return nil
}
