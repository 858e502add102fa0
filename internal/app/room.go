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

// ensureAlerts creates the stream of alerts once NATS is connected, then waits for ctx. It returns early only if
// there is no room for the stream. Whatever else fails is tried again with the first alert.
func ensureAlerts(ctx context.Context, nc *nats.Conn, stream *alerts.StreamSink, log *slog.Logger) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for !nc.IsConnected() {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	err := stream.Ensure(ctx)
	if consumers.NoRoom(err) {
		return err
	}
	if err != nil && ctx.Err() == nil {
		log.Warn("cannot create the stream of alerts yet", "err", err)
	}
	<-ctx.Done()
	return nil
}
