package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

// Volume bounds how many alerts on scores are sent. An alert beyond it is stored, and enters review, all the same; a
// summary of the hour counts it. Warnings and critical alerts have budgets of their own, so that one cannot
// crowd out the other. Monitors that commit at the same moment may exceed a budget by what they commit.
// The zero value bounds nothing; fields with a name are settings.
type Volume struct {
	// Maximum alerts of a class and severity that are sent in an hour of the clock; 0 means no bound.
	ClassPerHour int `name:"class-per-hour" default:"120" min:"0"`
	// Maximum alerts of a model and severity that are sent in an hour of the clock; 0 means no bound.
	ModelPerHour int `name:"model-per-hour" default:"1200" min:"0"`
	// How long further alerts of the same class, measurement and severity are held back after an alert was sent.
	// Defaults to 0s: not at all.
	CoolDown time.Duration `name:"cool-down" default:"0s" min:"0s"`
}

// Check returns an error that names the settings out of their bounds.
func (v Volume) Check() error { return settings.Check("volume", v) }

func (v Volume) bounded() bool { return v.ClassPerHour > 0 || v.ModelPerHour > 0 || v.CoolDown > 0 }

// budgetKey is what one budget is for; class is allClasses for the budget of a model.
type budgetKey struct {
	model    string
	severity schema.Severity
	class    int
}

const allClasses = -1

// coolDownKey is what cools down after an alert.
type coolDownKey struct {
	budgetKey
	measurement schema.MeasurementName
}

// spent is what was sent lately.
type spent struct {
	inHour map[budgetKey]int // since the hour began
	last   map[coolDownKey]time.Time
}

// applyBudgets sets the delivery of each alert that is not silenced by what was sent lately.
func applyBudgets(ctx context.Context, tx pgx.Tx, v Volume, alerts []*alertRow) error {
	if !v.bounded() || len(alerts) == 0 {
		return nil
	}
	var now time.Time
	if err := tx.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&now); err != nil {
		return err
	}
	sent, err := readSpent(ctx, tx, v, alerts, now)
	if err != nil {
		return err
	}
	for i := range alerts {
		if alerts[i].Delivery == schema.DispatchOwed {
			alerts[i].Delivery = v.deliver(sent, alerts[i], now)
		}
	}
	return nil
}

// readSpent reads what was sent of the alerts' models in this hour of the clock, and within the cool-down.
func readSpent(ctx context.Context, tx pgx.Tx, v Volume, alerts []*alertRow, now time.Time) (spent, error) {
	sent := spent{map[budgetKey]int{}, map[coolDownKey]time.Time{}}
	var models []string
	for _, a := range alerts {
		models = append(models, a.Model)
	}
	hour := now.UTC().Truncate(time.Hour)
	since := hour
	if cool := now.Add(-v.CoolDown); cool.Before(since) {
		since = cool
	}
	rows, err := tx.Query(ctx, alertsSpent, models, since, hour)
	if err != nil {
		return sent, err
	}
	var k coolDownKey
	var n int
	var last time.Time
	_, err = pgx.ForEachRow(rows, []any{&k.model, &k.measurement, &k.severity, &k.class, &n, &last}, func() error {
		sent.last[k] = last
		sent.inHour[k.budgetKey] += n
		sent.inHour[budgetKey{k.model, k.severity, allClasses}] += n
		return nil
	})
	return sent, err
}

// deliver decides on one alert and counts it if it is sent.
func (v Volume) deliver(sent spent, a *alertRow, now time.Time) schema.Dispatch {
	class, model := budgetKey{a.Model, a.Severity, a.ClassIndex}, budgetKey{a.Model, a.Severity, allClasses}
	cool := coolDownKey{class, a.Measurement}
	switch last := sent.last[cool]; {
	case v.CoolDown > 0 && !last.IsZero() && now.Sub(last) < v.CoolDown:
		return schema.DispatchCoolDown
	case v.ClassPerHour > 0 && sent.inHour[class] >= v.ClassPerHour:
		return schema.DispatchClassBudget
	case v.ModelPerHour > 0 && sent.inHour[model] >= v.ModelPerHour:
		return schema.DispatchModelBudget
	}
	sent.inHour[class]++
	sent.inHour[model]++
	sent.last[cool] = now
	return schema.DispatchOwed
}
