package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// OutboxNext returns at most limit messages that are due at the sink, oldest first, and withholds them from every
// other caller for the lease.
func (s *Store) OutboxNext(ctx context.Context, sink schema.Sink, limit int,
	lease time.Duration) ([]schema.OutboxMessage, error) {
	messages, err := list(ctx, s.pool, pgx.RowToStructByPos[schema.OutboxMessage], leaseOutbox, sink, limit, lease)
	if err != nil {
		return nil, fmt.Errorf("read outbox of %s: %w", sink, err)
	}
	return messages, nil
}

// OutboxDelivered records that the sink has taken the messages.
func (s *Store) OutboxDelivered(ctx context.Context, ids []int64) error {
	_, err := s.pool.Exec(ctx, outboxDelivered, ids)
	if err != nil {
		return fmt.Errorf("record deliveries: %w", err)
	}
	return nil
}

// OutboxFailed records a failed attempt and after what time the next may be made.
func (s *Store) OutboxFailed(ctx context.Context, id int64, reason string, wait time.Duration) error {
	_, err := s.pool.Exec(ctx, outboxFailed, id, clean(reason), wait)
	if err != nil {
		return fmt.Errorf("record failed delivery: %w", err)
	}
	return nil
}

// OutboxStats returns what is due by sink; a sink to which nothing is due is left out.
func (s *Store) OutboxStats(ctx context.Context) ([]schema.OutboxStats, error) {
	stats, err := list(ctx, s.pool, pgx.RowToStructByPos[schema.OutboxStats], outboxStats)
	if err != nil {
		return nil, fmt.Errorf("read outbox: %w", err)
	}
	return stats, nil
}

// RaiseAlert commits an alert that is about no single score (a summary, a drift, a missed canary) with what is owed
// to the sinks. It returns false if an alert with this id exists already.
func (s *Store) RaiseAlert(ctx context.Context, a schema.Alert) (bool, error) {
	c := &call{}
	if err := c.addAlert(a, s.config.Sinks); err != nil {
		return false, fmt.Errorf("raise alert: %w", err)
	}
	first := false
	err := s.begin(ctx, "raise alert "+a.ID, func(tx pgx.Tx) error {
		if err := applySilences(ctx, tx, []*alertRow{&c.alerts[0]}); err != nil {
			return err
		}
		b := &batch{}
		insert(b, "alerts", "ON CONFLICT DO NOTHING", c.alerts)
		if b.err != nil {
			return b.err
		}
		results := tx.SendBatch(ctx, &b.Batch)
		tag, err := results.Exec()
		if closeErr := results.Close(); err == nil {
			err = closeErr
		}
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		first = true
		if c.alerts[0].Delivery != schema.DispatchOwed {
			return nil
		}
		b = &batch{}
		insert(b, "outbox", "ON CONFLICT DO NOTHING", c.outbox)
		b.notify(ChannelOutbox)
		return b.send(ctx, tx)
	})
	return first, err
}

// AlertByID returns an alert. The error is ErrNotFound if it does not exist.
func (s *Store) AlertByID(ctx context.Context, id string) (schema.Alert, error) {
	found, err := listAlerts(ctx, s.pool, alertByID, id)
	if err != nil {
		return schema.Alert{}, fmt.Errorf("read alert %s: %w", id, err)
	}
	if len(found) == 0 {
		return schema.Alert{}, fmt.Errorf("alert %s: %w", id, ErrNotFound)
	}
	return found[0], nil
}

// AlertFilter chooses alerts; a field at its zero value does not.
type AlertFilter struct {
	Model    string
	Severity schema.Severity
	Class    *int
	Kind     schema.AlertKind
	NotKind  schema.AlertKind
	Since    time.Time // recorded at or after
	Limit    int       // Maximum number, newest first. Defaults to 100
}

// Alerts returns the newest alerts that the filter lets through, the newest first.
func (s *Store) Alerts(ctx context.Context, f AlertFilter) ([]schema.Alert, error) {
	if f.Limit == 0 {
		f.Limit = 100
	}
	alerts, err := listAlerts(ctx, s.pool, alertsList,
		f.Model, f.Severity, f.Class, f.Kind, f.NotKind, f.Since, f.Limit)
	if err != nil {
		return nil, fmt.Errorf("read alerts: %w", err)
	}
	return alerts, nil
}

// AlertDelivery is how far an alert is on its way to the stream.
type AlertDelivery string

// Deliveries of an alert.
const (
	AlertHeldBack AlertDelivery = "held_back" // beyond the bounds of Volume
	AlertOwed     AlertDelivery = "owed"      // the outbox has it
	AlertSent     AlertDelivery = "sent"      // the stream has taken it
)

// AlertDeliveries returns, for one moment, how far each alert is that was recorded at or after since, and each alert
// that is owed.
func (s *Store) AlertDeliveries(ctx context.Context, since time.Time) (map[string]AlertDelivery, error) {
	rows, err := s.pool.Query(ctx, alertsSent, schema.SinkStream, since)
	if err != nil {
		return nil, fmt.Errorf("read alerts: %w", err)
	}
	found := map[string]AlertDelivery{}
	var id string
	var d AlertDelivery
	if _, err := pgx.ForEachRow(rows, []any{&id, &d}, func() error { found[id] = d; return nil }); err != nil {
		return nil, fmt.Errorf("read alerts: %w", err)
	}
	return found, nil
}

// SampleID returns the id of the review of an event that was drawn at random: it looks like an alert's.
func SampleID(of schema.Identity) string {
	return schema.ID("sample", of.Source, of.Model, of.ID)
}
