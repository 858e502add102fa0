package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor/compare"
	"github.com/decuwatch/decuwatch/monitor/rescore"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// successor returns a copy of an ensemble that guides more, and so has another digest and other scores.
func successor(t *testing.T, of string, change func(manifest map[string]any)) *ensemble.Ensemble {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(of)); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(dir, "ensemble.json")
	rewrite(t, manifest, manifest, func(m map[string]any) {
		profile := m["profile"].(map[string]any)
		profile["guidance_scale"] = profile["guidance_scale"].(float64) + 0.5
		if change != nil {
			change(m)
		}
	})
	e, err := ensemble.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// number returns the count that a query on the bench's database gives.
func (b *bench) number(sql string) int {
	b.t.Helper()
	n, err := strconv.Atoi(b.query(`SELECT (` + sql + `)::text`)[0])
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}

// threshold sets a threshold that every class gap of an ensemble exceeds.
func (b *bench) threshold(of *ensemble.Ensemble) {
	b.t.Helper()
	_, err := b.store.SetThreshold(b.t.Context(), schema.Threshold{
		Model: of.Name, EnsembleDigest: of.Digest, Settings: of.Profile.Settings(), Measurement: schema.ClassGap,
		Scope: schema.ScopeModel, Severity: schema.SeverityWarn, Value: 1e-12, Origin: "manual", SetBy: "test",
		Reason: "every score fires",
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// From a shadow of the shipped ensemble to its promotion: stored events are scored again, thresholds calibrated from
// shadow scores, and the two compared. Nothing of it raises an alert.
func TestShadowOfTheShippedEnsemble(t *testing.T) {
	nats, db := natstest.Start(t), pgtest.URL(t)
	b := newBench(t, nats.URL(), db)
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.URL(), "DECUWATCH_POSTGRES_URL=" + db}}
	next := successor(t, shipped, nil)
	serve := func(args ...string) *worker {
		return start(t, user.env, append([]string{"serve", "-e", shipped, "--metrics.address=127.0.0.1:0",
			"--review.address=none", "--review.workers=0", "--postgres.commit-timeout=2s"}, args...)...)
	}
	publish := func(from, to int) {
		for i := from; i < to; i++ {
			user.run(exitOK, "publish", "--model=fashion-mnist", fmt.Sprint("--class=", i%3), fmt.Sprint("--seed=", i),
				fmt.Sprint("--id=e", i))
		}
	}
	rescored := []string{"rescore", "--model=fashion-mnist", "--since=1h", "--ensemble=" + next.Path}

	w := serve()
	isReady(t, metricsAddress(t, w))
	publish(0, 6)
	natstest.Until(t, "six events are scored", func() bool { return b.scored() == 6 })
	_, errs := user.run(exitFailed, rescored...)
	holds(t, errs, "no worker serves the ensemble "+next.Digest, "scoring.shadows")
	_, errs = user.run(exitFailed, "compare", shipped, next.Path)
	holds(t, errs, "no event", "scoring.shadows")
	out, _ := user.run(exitDifference, "promote", next.Path)
	holds(t, out, "not ready: the worker on ", "does not serve it")
	w.stop()

	w = serve("--scoring.shadows=" + next.Path)
	mux := metricsAddress(t, w)
	isReady(t, mux)
	natstest.Until(t, "the shadow has begun", func() bool {
		return b.number(`SELECT count(*) FROM decuwatch.shadow_positions`) == 1
	})
	publish(6, 9)
	natstest.Until(t, "the shadow scored the new events", func() bool {
		return b.number(`SELECT count(*) FROM decuwatch.rescores WHERE purpose = 'shadow'`) == 3
	})
	estimate := decode[rescore.Estimate](t, first(user.run(exitOK, append(rescored, "--dry-run", "--json")...)))
	if estimate.Events != 6 || estimate.Rows < 10 {
		t.Errorf("estimate %+v", estimate)
	}
	out, _ = user.run(exitOK, append(rescored, "--dry-run")...)
	holds(t, out, "events", "6 of fashion-mnist", "rows", next.Digest)
	out, errs = user.run(exitOK, rescored...)
	holds(t, out, "6 events scored again")
	holds(t, errs, "scoring: 6 of 6 events (100%)")
	out, _ = user.run(exitOK, rescored...)
	holds(t, out, "0 events scored again")
	_, metrics := get(t, mux+"/metrics")
	holds(t, metrics, `decuwatch_rescored_events_total{model="fashion-mnist",outcome="scored",purpose="rescore"} 6`,
		`decuwatch_rescored_events_total{model="fashion-mnist",outcome="scored",purpose="shadow"} 3`)

	for _, m := range []string{"class_gap", "request_risk"} {
		for _, of := range []string{shipped, next.Path} {
			user.run(exitOK, "thresholds", "calibrate", "--ensemble="+of, "--measurement="+m, "--alpha=0.3", "--pool=all",
				"--apply", "--reason=test", "--by=test")
		}
	}
	out, _ = user.run(exitOK, "compare", shipped, next.Digest[:12])
	holds(t, out, "9 events of fashion-mnist", "rank correlation", "appear", "class_gap", "request_risk")
	lines := map[string]int{}
	var total compare.Class
	for line := range strings.Lines(first(user.run(exitOK, "compare", shipped, next.Path, "--json"))) {
		kind := decode[struct{ Kind string }](t, line).Kind
		if c := decode[compare.Class](t, line); kind == "class" && c.Class < 0 {
			total = c
		}
		lines[kind]++
	}
	if lines["comparison"] != 1 || lines["class"] != 4 || lines["measurement"] < 2 || total.Events != 9 ||
		total.After != total.Before+total.Appear-total.Disappear {
		t.Errorf("lines %v, in total %+v", lines, total)
	}
	out, _ = user.run(exitOK, "promote", next.Path)
	holds(t, out, "ready", "scoring.ensembles: "+next.Path, "On the 9 events")
	if n := b.number(`SELECT count(*) FROM decuwatch.alerts WHERE kind = 'score'`); n != 0 {
		t.Errorf("%d alerts of re-scores that may raise none", n)
	}
	if n := b.number(`SELECT count(*) FROM decuwatch_views.scores`); n != 9 {
		t.Errorf("%d live scores", n)
	}
	w.stop()
}

// A run that is canceled takes back what waits, and the same command goes on later. What cannot be scored is reported.
func TestRescoreIsCanceledAndResumed(t *testing.T) {
	nats, db := natstest.Start(t), pgtest.URL(t)
	b := newBench(t, nats.URL(), db)
	next := successor(t, faultEnsemble, func(m map[string]any) {
		m["classes"].([]any)[3].(map[string]any)["label"] = "renamed"
	})
	b.set("consumers.ack-wait", patient)
	b.threshold(next)
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.URL(), "DECUWATCH_POSTGRES_URL=" + db}}
	w := b.worker()
	isReady(t, metricsAddress(t, w))
	b.publish(40)
	user.run(exitOK, "publish", "--model=tiny", "--class=class-3", "--seed=1", "--id=named")
	b.until("all is scored", func() bool { return b.scored() == 41 })
	w.stop()
	b.flags = append(b.flags, "--scoring.shadows="+next.Path)
	w = b.worker()
	isReady(t, metricsAddress(t, w))
	alerts := b.number(`SELECT count(*) FROM decuwatch.alerts`)

	args := []string{"rescore", "--model=tiny", "--since=1h", "--ensemble=" + next.Path, "--alert"}
	waiting := func() uint64 {
		stream, err := b.js.Stream(t.Context(), "RESCORE")
		if err != nil {
			t.Fatal(err)
		}
		info, err := stream.Info(t.Context(), jetstream.WithSubjectFilter("decuwatch.rescore.>"))
		if err != nil {
			t.Fatal(err)
		}
		return info.State.Msgs
	}
	w.signal(syscall.SIGSTOP)
	run := start(t, user.env, args...)
	b.until("its events wait", func() bool { return waiting() == 41 })
	run.signal(syscall.SIGINT)
	if state := run.wait(); state.ExitCode() != exitFailed {
		t.Errorf("canceled: %s\n%s", state, run.tail())
	}
	holds(t, run.tail(), "canceled after 0 events", "run it again")
	if n := waiting(); n != 0 {
		t.Errorf("%d events still wait", n)
	}
	w.signal(syscall.SIGCONT)

	// One event names its class by a label that the new ensemble does not have. What the worker held when the run was
	// canceled may be done by now.
	_, errs := user.run(exitFailed, args...)
	holds(t, errs, "could not be scored again: 1 unknown_class", "(100%)")
	if n := b.number(`SELECT count(*) FROM decuwatch.rescores WHERE purpose = 'rescore'`); n != 40 {
		t.Errorf("%d events scored again", n)
	}
	if n := b.number(`SELECT count(*) FROM decuwatch.alerts`); n != alerts+40 {
		t.Errorf("%d alerts, want one more for each of 40 re-scores than %d", n, alerts)
	}
	if n := b.number(`SELECT count(*) FROM decuwatch_views.rescore_failures WHERE event_id = 'named'`); n == 0 {
		t.Errorf("%d failures are recorded", n)
	}
	b.drained()
	out, _ := user.run(exitOK, "reconcile")
	holds(t, out, "41")
	for flag, words := range map[string]string{
		"--share=1.5": "--share is 1.5", "--since=x": "is no time", "--until=2020-01-01": "must be before --until",
		"--ensemble=" + shipped: "must be named as --model",
	} {
		_, errs := user.run(exitUsage, append(args[:len(args):len(args)], flag)...)
		holds(t, errs, words)
	}
	w.stop()
}

// Workers follow one after the other to a new ensemble that each serves as a shadow before. Every event gets a decision
// by the one or the other, and both workers are ready all the time.
func TestPromotionLeavesNoGap(t *testing.T) {
	b := newBench(t, natstest.Start(t).URL(), pgtest.URL(t))
	next := successor(t, faultEnsemble, nil)
	b.threshold(next)
	serving := func(live, shadow string) *worker {
		return start(t, nil, append([]string{"serve", "-e", live, "--scoring.shadows=" + shadow, "--nats.url=" + b.natsURL,
			"--postgres.url=" + b.pgURL, "--metrics.address=127.0.0.1:0", "--review.address=none", "--review.workers=0",
			"--scoring.threads=1"}, b.flags...)...)
	}
	before := serving(faultEnsemble, next.Path)
	was := metricsAddress(t, before)
	isReady(t, was)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				b.publish(1)
				time.Sleep(20 * time.Millisecond) // bounds the load, nothing waits for it
			}
		}
	}()
	by := func(digest string) int {
		return b.number(`SELECT count(*) FROM decuwatch.scores WHERE ensemble_digest = '` + digest + `'`)
	}
	old, _ := tinyProfile(t)
	b.until("the old ensemble scores", func() bool { return by(old) > 20 })
	after := serving(next.Path, faultEnsemble)
	is := metricsAddress(t, after)
	isReady(t, is)
	b.until("both score", func() bool { return by(next.Digest) > 20 })
	isReady(t, was)
	before.stop()
	count := by(next.Digest)
	b.until("the new ensemble scores", func() bool { return by(next.Digest) > count+20 })
	close(stop)
	<-stopped
	b.drained()
	if n := b.scored(); n != len(b.good) {
		t.Errorf("%d scores of %d events", n, len(b.good))
	}
	if n := b.number(`SELECT count(*) FROM decuwatch.scores s WHERE NOT EXISTS (SELECT FROM decuwatch.alerts a
		WHERE a.event_id = s.event_id AND a.ensemble_digest = s.ensemble_digest)`); n != 0 {
		t.Errorf("%d of %d events without a decision", n, b.scored())
	}
	after.stop()
}
