package alerts_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// The relay waits between attempts as long as it should, whatever the database's clock says.
func TestRelayWithAnotherClock(t *testing.T) {
	for _, ahead := range []time.Duration{-time.Hour, 0, time.Hour} {
		t.Run(ahead.String(), func(t *testing.T) {
			url := pgtest.ShiftedURL(t, ahead)
			store, err := postgres.Open(t.Context(), postgres.Config{URL: url, Sinks: []schema.Sink{schema.SinkWebhook},
				Log: quiet})
			if err != nil {
				t.Fatal(err)
			}
			defer store.Close()
			conn, err := pgx.Connect(t.Context(), url)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(context.WithoutCancel(t.Context()))
			var mu sync.Mutex
			answers, posts := []int{500, 500, 503}, 0
			receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				status := 503
				if posts < len(answers) {
					status = answers[posts]
				}
				if posts++; status == 503 {
					w.Header().Set("Retry-After", "1800")
				}
				w.WriteHeader(status)
			}))
			defer receiver.Close()
			hook, err := alerts.NewWebhook(alerts.WebhookConfig{URL: receiver.URL})
			if err != nil {
				t.Fatal(err)
			}
			record(t, store, "one")
			stop := relay(t, store, alerts.RelayConfig{Poll: 5 * time.Millisecond, RetryDelay: 50 * time.Millisecond}, hook)
			// Two short waits, then the long one that the receiver asked for.
			var attempts int
			var wait time.Duration
			natstest.Until(t, "three attempts were made", func() bool {
				err := conn.QueryRow(t.Context(),
					`SELECT attempts, next_attempt_at - clock_timestamp() FROM decuwatch.outbox`).Scan(&attempts, &wait)
				if err != nil {
					t.Fatal(err)
				}
				return attempts >= 3
			})
			if wait < 20*time.Minute || wait > 30*time.Minute {
				t.Errorf("the next attempt is in %s", wait)
			}
			stop()
			if mu.Lock(); posts != 3 {
				t.Errorf("%d posts", posts)
			}
			mu.Unlock()
			if stats, err := store.OutboxStats(t.Context()); err != nil || len(stats) != 1 || stats[0].Oldest < 0 ||
				stats[0].Oldest > 10*time.Minute {
				t.Errorf("%+v, %v", stats, err)
			}
		})
	}
}

// Retry-After is honored in both forms, by the receiver's own clock, and within bounds.
func TestRetryAfter(t *testing.T) {
	now := time.Now().UTC()
	theirs := now.Add(-5 * time.Hour)
	for name, c := range map[string]struct {
		date   time.Time
		values []string
		want   time.Duration
	}{
		"none":             {now, nil, 0},
		"seconds":          {now, []string{"120"}, 2 * time.Minute},
		"zero":             {now, []string{"0"}, 0},
		"an hour":          {now, []string{"3600"}, time.Hour},
		"too long":         {now, []string{"86400"}, time.Hour},
		"far too long":     {now, []string{"99999999999999999999999"}, time.Hour},
		"negative":         {now, []string{"-5"}, 0},
		"no number":        {now, []string{"soon"}, 0},
		"a fraction":       {now, []string{"1.5"}, 0},
		"twice":            {now, []string{"1", "2"}, 0},
		"a date":           {theirs, []string{theirs.Add(10 * time.Minute).Format(http.TimeFormat)}, 10 * time.Minute},
		"a date that was":  {theirs, []string{theirs.Add(-10 * time.Minute).Format(http.TimeFormat)}, 0},
		"a date far ahead": {theirs, []string{theirs.AddDate(10, 0, 0).Format(http.TimeFormat)}, time.Hour},
		"another format":   {theirs, []string{theirs.Add(time.Minute).Format(time.ANSIC)}, time.Minute},
	} {
		receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Date", c.date.Format(http.TimeFormat))
			for _, v := range c.values {
				w.Header().Add("Retry-After", v)
			}
			w.WriteHeader(http.StatusServiceUnavailable)
		}))
		hook, err := alerts.NewWebhook(alerts.WebhookConfig{URL: receiver.URL})
		if err != nil {
			t.Fatal(err)
		}
		_, m := message(t)
		var after interface{ RetryAfter() time.Duration }
		if err := hook.Send(t.Context(), m); !errors.As(err, &after) || after.RetryAfter() != c.want {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
		receiver.Close()
	}
}

// An alert in Alertmanager starts now at the latest and ends later, by its own clock.
func TestAlertmanagerWithAnotherClock(t *testing.T) {
	for _, ahead := range []time.Duration{-3 * time.Hour, 0, 3 * time.Hour} {
		var last struct{ StartsAt, EndsAt time.Time }
		posts := 0
		receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			posts++
			body, err := io.ReadAll(r.Body)
			var list []struct{ StartsAt, EndsAt time.Time }
			if err == nil {
				err = json.Unmarshal(body, &list)
			}
			w.Header().Set("Date", time.Now().UTC().Add(ahead).Format(http.TimeFormat))
			if err != nil || len(list) != 1 || !list[0].StartsAt.Before(list[0].EndsAt) {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			last = list[0]
		}))
		sink, err := alerts.NewAlertmanager(alerts.AlertmanagerConfig{URL: receiver.URL})
		if err != nil {
			t.Fatal(err)
		}
		_, m := message(t)
		for range 3 {
			if err := sink.Send(t.Context(), m); err != nil {
				t.Errorf("%s: %v", ahead, err)
			}
			theirs := time.Now().Add(ahead)
			if left := last.EndsAt.Sub(theirs); left < 50*time.Minute || left > 61*time.Minute ||
				last.StartsAt.After(theirs.Add(time.Minute)) {
				t.Errorf("%s: starts %s, ends %s", ahead, last.StartsAt.Sub(theirs), left)
			}
		}
		if posts > 4 {
			t.Errorf("%s: %d posts for 3 alerts", ahead, posts)
		}
		receiver.Close()
	}
}
