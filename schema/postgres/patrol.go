package postgres

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

// Deliveries of an alert.
const (
	deliveryOwed        = "owed"
	deliveryClassBudget = "class_budget"
	deliveryModelBudget = "model_budget"
	deliveryCoolDown    = "cool_down"
)

// Volume bounds how many alerts on scores are sent. An alert beyond it is stored, and enters review, all the same; a
// summary of the hour counts it. Warnings and critical alerts have budgets of their own, so that the one cannot crowd
// out the other. Monitors that commit at the same moment may exceed a budget by what they commit.
// The zero value bounds nothing; fields with a name are settings.
type Volume struct {
	// Alerts of a class and severity that are sent in an hour of the clock, at most; 0 is no bound.
	ClassPerHour int `name:"class-per-hour" default:"120" min:"0"`
	// Alerts of a model and severity that are sent in an hour of the clock, at most; 0 is no bound.
	ModelPerHour int `name:"model-per-hour" default:"1200" min:"0"`
	// How long more alerts of the same class, measurement and severity are held back after one was sent. Defaults to
	// 0s: not at all.
	CoolDown time.Duration `name:"cool-down" default:"0s" min:"0s"`
}

// Check returns an error that names the settings out of their bounds.
func (v Volume) Check() error { return settings.Check("volume", v) }

func (v Volume) bounded() bool { return v.ClassPerHour > 0 || v.ModelPerHour > 0 || v.CoolDown > 0 }

// volumeKey is what is counted and cooled down by.
type volumeKey struct {
	model       string
	measurement schema.MeasurementName
	severity    schema.Severity
	class       int
}

// spent is what was sent of a key lately.
type spent struct {
	hour int // in the present hour
	last time.Time
}

// limit sets the delivery of each alert from what was sent lately.
func limit(ctx context.Context, tx pgx.Tx, v Volume, alerts []alertRow) error {
	if !v.bounded() || len(alerts) == 0 {
		return nil
	}
	var models []string
	for _, a := range alerts {
		if !slices.Contains(models, a.Model) {
			models = append(models, a.Model)
		}
	}
	var now time.Time
	if err := tx.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&now); err != nil {
		return err
	}
	hour := now.UTC().Truncate(time.Hour)
	since := hour
	if cool := now.Add(-v.CoolDown); cool.Before(since) {
		since = cool
	}
	rows, err := tx.Query(ctx, `SELECT model, measurement, severity, class_index, count(*) FILTER (WHERE recorded_at >= $3), max(recorded_at) FROM decuwatch.alerts
		WHERE model = ANY ($1) AND recorded_at >= $2 AND kind = 'score' AND delivery = 'owed' GROUP BY 1, 2, 3, 4`, models, since, hour)
	if err != nil {
		return err
	}
	sent := map[volumeKey]spent{}
	type bySeverity struct {
		model    string
		severity schema.Severity
		class    int
	}
	counts := map[bySeverity]int{} // class -1: of the model
	var k volumeKey
	var s spent
	_, err = pgx.ForEachRow(rows, []any{&k.model, &k.measurement, &k.severity, &k.class, &s.hour, &s.last}, func() error {
		sent[k] = s
		counts[bySeverity{k.model, k.severity, k.class}] += s.hour
		counts[bySeverity{k.model, k.severity, -1}] += s.hour
		return nil
	})
	if err != nil {
		return err
	}
	for i := range alerts {
		a := &alerts[i]
		k := volumeKey{a.Model, a.Measurement, a.Severity, a.ClassIndex}
		class, model := bySeverity{a.Model, a.Severity, a.ClassIndex}, bySeverity{a.Model, a.Severity, -1}
		last := sent[k].last
		switch {
		case v.CoolDown > 0 && !last.IsZero() && now.Sub(last) < v.CoolDown:
			a.Delivery = deliveryCoolDown
		case v.ClassPerHour > 0 && counts[class] >= v.ClassPerHour:
			a.Delivery = deliveryClassBudget
		case v.ModelPerHour > 0 && counts[model] >= v.ModelPerHour:
			a.Delivery = deliveryModelBudget
		default:
			a.Delivery = deliveryOwed
			counts[class]++
			counts[model]++
			sent[k] = spent{last: now}
		}
	}
	return nil
}

// HeldBack counts the alerts recorded in [from, to) that were not sent, by hour, class and severity.
func (s *Store) HeldBack(ctx context.Context, from, to time.Time) ([]schema.HeldBack, error) {
	rows, err := s.pool.Query(ctx, `SELECT date_trunc('hour', recorded_at, 'UTC'), model, class_index, max(class_label), severity,
			count(*) FILTER (WHERE delivery = 'class_budget'), count(*) FILTER (WHERE delivery = 'model_budget'), count(*) FILTER (WHERE delivery = 'cool_down')
		FROM decuwatch.alerts WHERE delivery <> 'owed' AND recorded_at >= $1 AND recorded_at < $2 GROUP BY 1, 2, 3, 5 ORDER BY 1, 2, 3, 5`, from, to)
	if err != nil {
		return nil, fmt.Errorf("count alerts that were held back: %w", err)
	}
	held, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (h schema.HeldBack, err error) {
		err = row.Scan(&h.Hour, &h.Model, &h.ClassIndex, &h.ClassLabel, &h.Severity, &h.ClassBudget, &h.ModelBudget, &h.CoolDown)
		h.Hour = h.Hour.UTC()
		return h, err
	})
	if err != nil {
		return nil, fmt.Errorf("count alerts that were held back: %w", err)
	}
	return held, nil
}

// ClassSequences returns the class gaps of each class's newest scores by one ensemble under one settings key, at most
// limit of them with event times after since, and after quiet has passed since the class's last alert of a drift.
// Canaries are left out.
func (s *Store) ClassSequences(ctx context.Context, model, ensembleDigest, settings string, since time.Time, quiet time.Duration, limit int) ([]schema.ClassSequence, error) {
	rows, err := s.pool.Query(ctx, `
		SELECT k.class_index, k.class_label, s.event_time, s.source || ' ' || s.event_id, s.class_gap
		FROM (
			SELECT class_index, max(class_label) AS class_label FROM decuwatch.class_day_parts
			WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND day >= date_trunc('day', $4::timestamptz, 'UTC') GROUP BY class_index
		) k
		LEFT JOIN (
			SELECT class_index, max(event_time) AS event_time FROM decuwatch.alerts
			WHERE kind = 'class_drift' AND model = $1 AND ensemble_digest = $2 AND settings = $3 GROUP BY class_index
		) a USING (class_index)
		CROSS JOIN LATERAL (
			SELECT event_time, source, event_id, class_gap FROM decuwatch.scores s
			WHERE s.model = $1 AND s.class_index = k.class_index AND s.ensemble_digest = $2 AND s.settings = $3
			AND s.event_time > greatest($4, a.event_time + $5::interval)
			AND NOT EXISTS (SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model)
			ORDER BY s.event_time DESC, s.source DESC, s.event_id DESC LIMIT $6
		) s
		ORDER BY k.class_index, s.event_time, s.source, s.event_id`, model, ensembleDigest, settings, since, quiet, limit)
	if err != nil {
		return nil, fmt.Errorf("read sequences of scores: %w", err)
	}
	var sequences []schema.ClassSequence
	var class int
	var label, last string
	var at time.Time
	var value float64
	_, err = pgx.ForEachRow(rows, []any{&class, &label, &at, &last, &value}, func() error {
		if n := len(sequences); n == 0 || sequences[n-1].ClassIndex != class {
			sequences = append(sequences, schema.ClassSequence{ClassIndex: class, ClassLabel: label})
		}
		q := &sequences[len(sequences)-1]
		q.Last = last
		q.Times, q.Values = append(q.Times, at.UTC()), append(q.Values, value)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read sequences of scores: %w", err)
	}
	return sequences, nil
}

// Tail returns the value that at most a share alpha of the scores of some classes since a moment reach, for one
// measurement, and how many scores there were, canaries left out. The value means nothing where there were fewer than 1/alpha.
func (s *Store) Tail(ctx context.Context, model, ensembleDigest, settings string, measurement schema.MeasurementName, classes []int, since time.Time, alpha float64) (value float64, n int, err error) {
	if measurement != schema.ClassGap && measurement != schema.RequestRisk {
		return 0, 0, fmt.Errorf("read tail of scores: measurement %q is neither class_gap nor request_risk", measurement)
	}
	err = s.pool.QueryRow(ctx, `SELECT coalesce(percentile_disc(1 - $6::float8) WITHIN GROUP (ORDER BY `+string(measurement)+`::float8), 0), count(*) FROM decuwatch.scores s
		WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND class_index = ANY ($4) AND event_time >= $5
		AND NOT EXISTS (SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model)`,
		model, ensembleDigest, settings, classes, since, alpha).Scan(&value, &n)
	if err != nil {
		return 0, 0, fmt.Errorf("read tail of scores: %w", err)
	}
	return value, n, nil
}
