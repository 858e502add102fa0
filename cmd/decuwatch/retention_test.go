package main

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor/replay"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// TestEventOlderThanRetention publishes an event whose score retention would drop. It is refused, with the bound,
// before any work is done, and replay says so.
func TestEventOlderThanRetention(t *testing.T) {
	nats := natstest.Start(t)
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.URL(), "DECUWATCH_POSTGRES_URL=" + pgtest.URL(t)}}
	serve := start(t, user.env, "serve", "-e", faultEnsemble, "--metrics.address=127.0.0.1:0",
		"--review.address=127.0.0.1:0", "--retention.scores=720h")
	mux := metricsAddress(t, serve)
	for id, age := range map[string]time.Duration{"old": 31 * 24 * time.Hour, "young": 29 * 24 * time.Hour} {
		at := time.Now().Add(-age).UTC().Format(time.RFC3339)
		user.feed(fmt.Sprintf(`{"specversion":"1.0","type":"io.decuwatch.generation.requested.v1","source":"/tests",`+
			`"id":%q,"time":%q,"data":{"model":"tiny","class":1,"seed":5}}`, id, at), exitOK, "publish", "-")
	}
	counted := func(outcome string) bool {
		_, text := get(t, mux+"/metrics")
		return regexp.MustCompile(`(?m)^decuwatch_events_total\{.*outcome="` + outcome + `".*\} 1$`).MatchString(text)
	}
	natstest.Until(t, "both events have their verdict", func() bool {
		return counted("score") && counted("dead_letter")
	})
	_, errs := user.run(exitFailed, "replay", "-e", faultEnsemble, "old")
	holds(t, errs, "no score is stored", "time", "30 days")
	user.run(exitOK, "replay", "-e", faultEnsemble, "young")
	_, text := get(t, mux+"/metrics")
	counter := regexp.MustCompile(`(?m)^decuwatch_sampler_rows_total\{kind="live",model="tiny"\} (\d+)$`)
	rows := counter.FindStringSubmatch(text)
	out, _ := user.run(exitOK, "replay", "-e", faultEnsemble, "--json", "young")
	one := decode[replay.Replay](t, out).Stored.Receipt.Rows
	if rows == nil || rows[1] != fmt.Sprint(one) {
		t.Errorf("%s rows were computed, want the %d of the young event", strings.Join(rows, " "), one)
	}
	_, errs = user.run(exitUsage, "serve", "-e", faultEnsemble, "--retention.scores=719h")
	holds(t, errs, "retention.scores", "720h")
	serve.stop()
}

// TestNewerTables uses tables of a newer program: migrate refuses them, serve works with them.
func TestNewerTables(t *testing.T) {
	nats, url := natstest.Start(t), pgtest.URL(t)
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	_, err = conn.Exec(t.Context(), `INSERT INTO decuwatch.migrations (version_id, is_applied) VALUES (99999, true)`)
	if err != nil {
		t.Fatal(err)
	}
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.URL(), "DECUWATCH_POSTGRES_URL=" + url}}
	out, errs := user.run(exitFailed, "migrate")
	holds(t, errs, "version 99999", "nothing was changed")
	if out != "" {
		t.Errorf("migrate says: %s", out)
	}
	serve := start(t, user.env, "serve", "-e", faultEnsemble, "--metrics.address=127.0.0.1:0",
		"--review.address=127.0.0.1:0", "--postgres.migrate")
	mux := metricsAddress(t, serve)
	user.run(exitOK, "publish", "--model=tiny", "--class=0", "--seed=1")
	natstest.Until(t, "the event is scored", func() bool {
		_, text := get(t, mux+"/metrics")
		return strings.Contains(text, `decuwatch_events_total{model="tiny",outcome="score",reason="none"} 1`)
	})
	holds(t, serve.tail(), "the tables are left as they are")
	serve.stop()
}
