package main

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/replay"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// judged is an ensemble with a judge, which cannot tell its classes 1 and 2.
const judged = "../../scoring/testdata/tiny-2"

// The image risk goes the way of the other measurements: from the threshold to the alert, its stream, SQL, metrics and
// replay. A request whose class the judge cannot tell has none, raises no alert, and says why.
func TestImageRiskFromThresholdToReplay(t *testing.T) {
	nats := natstest.Start(t)
	db := pgtest.URL(t)
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.URL(), "DECUWATCH_POSTGRES_URL=" + db}}
	for _, limit := range [][]string{
		{"--value=0", "--severity=critical"}, // every image risk reaches it, and so would a NULL that is taken for 0
		{"--value=0", "--limit", "--severity=warn"},
	} {
		user.run(exitOK, append([]string{"thresholds", "set", judged, "--measurement=image_risk", "--reason=test"},
			limit...)...)
	}
	out, _ := user.run(exitOK, "thresholds", "list")
	holds(t, out, "image_risk", "critical")
	_, errs := user.run(exitUsage, "thresholds", "set", judged, "--measurement=x", "--value=0", "--reason=test")
	holds(t, errs, "image_risk")

	serve := start(t, user.env, "serve", "-e", judged, "--metrics.address=127.0.0.1:0", "--review.address=127.0.0.1:0",
		"--scoring.threads=1")
	mux := metricsAddress(t, serve)
	isReady(t, mux)
	_, metrics := get(t, mux+"/metrics")
	holds(t, metrics,
		`decuwatch_score_count{class="class-0",measurement="image_risk",model="tiny-2"} 0`,
		`decuwatch_unmeasured_scores_total{model="tiny-2",reason="judge_cannot_tell"} 0`,
		`decuwatch_unmeasured_scores_total{model="tiny-2",reason="no_judge"} 0`,
		`decuwatch_class_gap_closed_form_ratio{end="least",model="tiny-2"} 0`)
	for _, class := range []string{"0", "1", "2", "3"} {
		user.run(exitOK, "publish", "--model=tiny-2", "--class="+class, "--seed=7", "--id=class-"+class)
	}
	natstest.Until(t, "all events are scored", func() bool {
		_, metrics = get(t, mux+"/metrics")
		return strings.Contains(metrics, `decuwatch_events_total{model="tiny-2",outcome="score",reason="none"} 4`)
	})
	holds(t, metrics,
		`decuwatch_score_count{class="class-0",measurement="image_risk",model="tiny-2"} 1`,
		`decuwatch_score_count{class="class-2",measurement="image_risk",model="tiny-2"} 0`,
		`decuwatch_unmeasured_scores_total{model="tiny-2",reason="judge_cannot_tell"} 2`)
	natstest.Until(t, "both alerts are published", func() bool {
		out, _ = user.run(exitOK, "watch", "--all", "--no-follow", "--json")
		return strings.Count(out, "\n") == 2
	})
	for line := range strings.Lines(out) {
		a := decode[schema.Alert](t, line)
		if a.Measurement != schema.ImageRisk || a.Severity != schema.SeverityCritical || a.ImageRisk == nil ||
			*a.ImageRisk != a.Value || a.Value < 0 || a.Value > 1 {
			t.Errorf("alert %+v", a)
		}
	}
	out, _ = user.run(exitOK, "watch", "--all", "--no-follow")
	holds(t, out, "image_risk", "class-0", "class-3", "model_threshold")

	for class, words := range map[string][]string{"0": {"class_gap", "request_risk", "image_risk", "agrees"},
		"2": {"class_gap", "request_risk", "agrees"}} {
		out, _ = user.run(exitOK, "replay", "-e", judged, "class-"+class)
		holds(t, out, words...)
		r := decode[replay.Replay](t, first(user.run(exitOK, "replay", "-e", judged, "--json", "class-"+class)))
		if len(r.Measurements()) != len(words)-1 {
			t.Errorf("class %s: %d measurements are compared", class, len(r.Measurements()))
		}
	}
	// A stored image risk that is not what the request gives is found.
	conn, err := pgx.Connect(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, c := range []struct {
		sql  string
		want int
	}{
		{`SELECT count(*) FROM decuwatch_views.scores WHERE image_risk IS NULL AND image_risk_reason = 'judge_cannot_tell'
			AND class_index IN (1, 2)`, 2},
		{`SELECT count(*) FROM decuwatch_views.scores WHERE image_risk BETWEEN 0 AND 1 AND image_risk_reason IS NULL
			AND jsonb_array_length(image_risk_top) = 3 AND image_risk_tables = 'producer' AND class_gap_tables = 'posterior'
			AND request_risk_guidance = 'shared' AND image_risk_steps = 4 AND class_gap_steps = 3`, 2},
		{`SELECT count(*) FROM decuwatch_views.scores WHERE class_images = 100 AND class_n_eff = 10
			AND class_draws = 2000`, 1},
		{`SELECT count(*) FROM decuwatch_views.class_data WHERE model = 'tiny-2' AND class_label = 'class-2' AND images = 100
			AND n_eff = 10 AND likely_mislabeled = 5 AND draws = 2000 AND class_gap > 0 AND judge_accuracy = 0.5`, 1},
		{`SELECT count(*) FROM decuwatch_views.class_data WHERE images IS NULL AND draws IS NOT NULL`, 1},
	} {
		var n int
		if err := conn.QueryRow(t.Context(), c.sql).Scan(&n); err != nil || n != c.want {
			t.Errorf("%d, want %d: %v: %s", n, c.want, err, c.sql)
		}
	}
	if _, err := conn.Exec(t.Context(), `ALTER TABLE decuwatch.scores DISABLE TRIGGER append_only;
		UPDATE decuwatch.scores SET image_risk = 1 - image_risk WHERE event_id = 'class-0'`); err != nil {
		t.Fatal(err)
	}
	out, _ = user.run(exitDifference, "replay", "-e", judged, "class-0")
	holds(t, out, "does NOT agree")

	// A calibration takes the scores of the well-sampled class, 3, that have one.
	_, errs = user.run(exitFailed, "thresholds", "calibrate", judged, "--measurement=image_risk", "--alpha=0.01")
	holds(t, errs, "1 are there")
	serve.stop()

	// The next start finds its classes there.
	serve = start(t, user.env, "serve", "-e", judged, "--metrics.address=127.0.0.1:0", "--review.address=127.0.0.1:0",
		"--scoring.threads=1")
	isReady(t, metricsAddress(t, serve))
	serve.stop()
}

// The demo shows all measurements, and sends every alert: a class raises more here than its budget of an hour allows.
func TestDemoOfThreeMeasurements(t *testing.T) {
	out, _ := command{t: t}.process(exitOK, "demo", "--dir", filepath.Join(t.TempDir(), "demo"), "--ensemble", judged,
		"--requests=600", "--nats-port=0", "--metrics-port=0", "--review-port=0")
	holds(t, out, "class gap", "request risk", "image risk",
		"Reconciled: 600 messages in the stream = 600 scores", " 0 held back.")
	alerted := 0
	for line := range strings.Lines(out) {
		cells := strings.Fields(strings.ReplaceAll(line, "█", "")) // without the bars
		if len(cells) < 8 || !strings.HasPrefix(cells[0], "class-") {
			continue
		}
		// class, images, requests, gap, threshold, risk, threshold, image risk, threshold
		if unmeasured := cells[0] == "class-1" || cells[0] == "class-2"; unmeasured != (cells[7] == "-") {
			t.Errorf("the image risk of %s is %s", cells[0], cells[7])
		}
		n, err := strconv.Atoi(cells[len(cells)-1])
		if err != nil {
			t.Error(err)
		}
		alerted = max(alerted, n)
	}
	if budget := app.DefaultConfig().Volume.ClassPerHour; alerted <= budget {
		t.Errorf("%d requests of a class raised an alert, which the budget of %d an hour allows", alerted, budget)
	}
}
