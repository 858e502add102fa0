package postgres_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// A silence keeps what it is about from being sent, and nothing else. The alerts are stored, counted and reviewed.
func TestSilences(t *testing.T) {
	s, conn := open(t, postgres.Config{Sinks: []schema.Sink{schema.SinkStream}})
	n := uint64(0)
	record := func(class int, measurement schema.MeasurementName) (schema.Dispatch, string) {
		t.Helper()
		n++
		v := alertVerdict(n, measurement, class)
		r, err := s.Record(testContext(t), v)
		if err != nil || !r.First {
			t.Fatal(r, err)
		}
		return r.Withheld[v.Alerts[0].ID], v.Alerts[0].ID
	}
	zero := 0
	past, err := s.AddSilence(testContext(t), postgres.Silence{Model: alertModel, Author: "ada", Reason: "past",
		StartsAt: time.Now().Add(-2 * time.Hour)}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if d, _ := record(0, schema.ClassGap); d != "" {
		t.Errorf("a past silence: %q", d)
	}
	id, err := s.AddSilence(testContext(t), postgres.Silence{Model: alertModel, ClassIndex: &zero,
		Measurement: schema.ClassGap, Author: "ada", Reason: "known"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	silenced, alert := record(0, schema.ClassGap)
	if silenced != schema.DispatchSilenced {
		t.Errorf("the silenced alert: %q", silenced)
	}
	for _, c := range []struct {
		class       int
		measurement schema.MeasurementName
	}{{1, schema.ClassGap}, {0, schema.RequestRisk}} {
		if d, _ := record(c.class, c.measurement); d != "" {
			t.Errorf("an alert on class %d, %s: %q", c.class, c.measurement, d)
		}
	}
	if _, err := s.AlertByID(testContext(t), alert); err != nil {
		t.Errorf("the silenced alert is not stored: %v", err)
	}
	if _, err := s.ReviewByID(testContext(t), alert); err != nil {
		t.Errorf("the silenced alert is not reviewed: %v", err)
	}
	if got := count(t, conn, `SELECT count(*) FROM decuwatch.outbox WHERE message_id = '`+alert+`'`); got != 0 {
		t.Errorf("%d messages are owed", got)
	}
	if got := count(t, conn, `SELECT count(*) FROM decuwatch_views.alerts WHERE delivery = 'silenced'`); got != 1 {
		t.Errorf("%d alerts are silenced in the view", got)
	}
	held, err := s.HeldBack(testContext(t), time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	if err != nil || len(held) != 0 {
		t.Errorf("a summary would count silenced alerts: %v, %v", held, err)
	}
	drift := schema.Alert{ID: "drift", Kind: schema.AlertClassDrift, Model: alertModel, ClassIndex: 0,
		Measurement: schema.ClassGap, Severity: schema.SeverityWarn, Reason: "class_drift", EventTime: at, FiredAt: at}
	missing := drift
	missing.ID, missing.Kind, missing.Reason = "missing", schema.AlertThresholdMissing, "threshold_missing"
	for _, a := range []schema.Alert{drift, missing} {
		if _, err := s.RaiseAlert(testContext(t), a); err != nil {
			t.Fatal(err)
		}
	}
	if got := count(t, conn, `SELECT count(*) FROM decuwatch.outbox WHERE message_id IN ('drift', 'missing')`); got != 1 {
		t.Errorf("%d of a drift and a missing threshold are owed, want the second", got)
	}
	list, err := s.Silences(testContext(t), alertModel, true, 10)
	if err != nil || len(list) != 2 || list[0].ID != id || !list[0].InForce || list[0].Silenced != 2 ||
		list[1].ID != past {
		t.Errorf("%+v, %v", list, err)
	}
	if counts, err := s.SilenceCounts(testContext(t)); err != nil || counts[alertModel] != 1 {
		t.Errorf("%v, %v", counts, err)
	}
	if err := s.EndSilence(testContext(t), id, "grace"); err != nil {
		t.Fatal(err)
	}
	if err := s.EndSilence(testContext(t), id, "grace"); !errors.Is(err, postgres.ErrNotFound) {
		t.Errorf("ended twice: %v", err)
	}
	if d, _ := record(0, schema.ClassGap); d != "" {
		t.Errorf("after its end: %q", d)
	}
}

// An alert that every sink has taken is sent, not owed.
func TestSentAlertsAreNotOwed(t *testing.T) {
	s, conn := open(t, postgres.Config{Sinks: []schema.Sink{schema.SinkStream, schema.SinkWebhook}})
	v := alertVerdict(1, schema.ClassGap, 0)
	mustRecord(t, s, v)
	delivery := func() string {
		return list(t, conn, `SELECT delivery FROM decuwatch_views.production_alerts`)[0]
	}
	for _, sink := range []schema.Sink{schema.SinkStream, schema.SinkWebhook} {
		if got := delivery(); got != "owed" {
			t.Errorf("before %s took it: %s", sink, got)
		}
		due, err := s.OutboxNext(testContext(t), sink, 10, time.Minute)
		if err != nil || len(due) != 1 {
			t.Fatal(due, err)
		}
		if err := s.OutboxDelivered(testContext(t), []int64{due[0].ID}); err != nil {
			t.Fatal(err)
		}
	}
	if got := delivery(); got != "sent" {
		t.Errorf("after both took it: %s", got)
	}
}

var alertModel = event("").Data.Model

// alertVerdict returns a score of a class with one alert on a measurement.
func alertVerdict(sequence uint64, measurement schema.MeasurementName, class int) schema.Verdict {
	v := scoreVerdict(sequence, fmt.Sprint("event-", sequence))
	v.Score.ClassIndex = class
	a := alert(v.Score, schema.ID("alert", fmt.Sprint(sequence)))
	a.Model, a.ClassIndex, a.Measurement = alertModel, class, measurement
	v.Alerts = []schema.Alert{a}
	return v
}
