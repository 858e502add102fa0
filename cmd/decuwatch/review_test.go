package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/canary"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// loop is a monitor that serves in this process on servers of its own, and what its people do.
type loop struct {
	t     *testing.T
	cfg   app.Config
	page  string
	js    jetstream.JetStream
	store *postgres.Store

	components int // of the ensemble
}

// newLoop serves the shipped ensemble. Every request without an alert enters review. Under-trained classes fire, and
// well-trained classes do not.
func newLoop(t *testing.T) *loop {
	t.Helper()
	l := &loop{t: t, cfg: app.DefaultConfig()}
	l.cfg.NATS.URL, l.cfg.Postgres.URL = natstest.Start(t).URL(), pgtest.URL(t)
	l.cfg.Metrics.Address, l.cfg.Review.Address, l.cfg.Review.Share = "127.0.0.1:0", "127.0.0.1:0", 1
	l.cfg.Scoring.Ensembles, l.cfg.Scoring.Threads = []string{shipped}, 1
	l.cfg.Consumers.AckWait = time.Minute
	var err error
	if l.js, err = jetstream.New(natstest.Connect(t, l.cfg.NATS.URL)); err != nil {
		t.Fatal(err)
	}
	if l.store, err = postgres.Open(t.Context(), postgres.Config{URL: l.cfg.Postgres.URL}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.store.Close)
	e, err := ensemble.Open(shipped)
	if err != nil {
		t.Fatal(err)
	}
	l.components = e.Components
	rare, err := canary.Classes(&e.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	for class := range e.Classes { // a limit that only the rarest classes reach, whatever the ensemble's reference
		value := 1e6
		for _, i := range rare {
			if i == class {
				value = 1e-9
			}
		}
		if _, err := l.store.SetThreshold(t.Context(), schema.Threshold{
			Model: e.Name, EnsembleDigest: e.Digest, Settings: e.Profile.Settings(), Measurement: schema.ClassGap,
			Scope: schema.ScopeClass, Class: &class,
			Severity: schema.SeverityCritical, Value: value, Origin: "manual", SetBy: "test", Reason: "the rarest classes fire",
		}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	up, down := make(chan app.Serving, 1), make(chan error, 1)
	go func() {
		down <- app.Serve(ctx, l.cfg, app.Options{
			Log: slog.New(slog.DiscardHandler), Started: func(s app.Serving) { up <- s },
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-down; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	select {
	case s := <-up:
		l.page = "http://" + s.Review
	case err := <-down:
		down <- err
		t.Fatalf("serve: %v", err)
	}
	return l
}

// publish publishes one request.
func (l *loop) publish(id, class string, seed uint64) {
	l.t.Helper()
	if _, err := consumers.EnsureStream(l.t.Context(), l.js, consumers.StreamConfig{}); err != nil {
		l.t.Fatal(err)
	}
	ev := schema.Event{
		Source: "/review/loop", ID: id, Time: time.Now().UTC(),
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassLabel(class), Seed: seed},
	}
	if _, err := schema.Publish(l.t.Context(), l.js, ev); err != nil {
		l.t.Fatal(err)
	}
}

// next returns the next message of a subject of the stream of alerts, waiting for it.
func (l *loop) next(subject string) jetstream.Msg {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), 2*time.Minute)
	defer cancel()
	consumer, err := l.js.OrderedConsumer(ctx, l.cfg.Alerts.Stream,
		jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}})
	if err != nil {
		l.t.Fatal(err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		l.t.Fatal(err)
	}
	defer messages.Stop()
	defer context.AfterFunc(ctx, messages.Stop)()
	msg, err := messages.Next()
	if err != nil {
		l.t.Fatalf("no message on %s: %v", subject, err)
	}
	return msg
}

// run runs a verb as a user would and returns what it printed.
func (l *loop) run(want int, args ...string) (stdout, stderr string) {
	l.t.Helper()
	env := map[string]string{"DECUWATCH_POSTGRES_URL": l.cfg.Postgres.URL, "DECUWATCH_NATS_URL": l.cfg.NATS.URL}
	var out, errs bytes.Buffer
	before := slog.Default()
	defer slog.SetDefault(before)
	getenv := func(name string) string { return env[name] }
	if code := run(l.t.Context(), args, getenv, strings.NewReader(""), &out, &errs); code != want {
		l.t.Fatalf("decuwatch %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), code, want, &out, &errs)
	}
	return out.String(), errs.String()
}

// The whole loop: event, alert, evidence, page, verdict, statistics.
func TestReviewLoop(t *testing.T) {
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("the review page is tested in Chromium, which is missing: run make review-tools (%v)", err)
	}
	l := newLoop(t)
	l.publish("rare", "T-shirt/top", 1)
	l.publish("known", "Sneaker", 2)

	// The alert arrives, and its id opens the page.
	alert, err := schema.DecodeAlert(l.next("uncertainty.alert.fashion-mnist.critical.*").Data())
	if err != nil || alert.EventID != "rare" {
		t.Fatalf("alert %+v, %v", alert, err)
	}
	base, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	home, err := os.MkdirTemp("", "chromium")
	if err != nil {
		t.Fatal(err)
	}
	// The browser's processes may still write into its directory.
	defer natstest.Until(t, "the browser's directory is removed", func() bool { return os.RemoveAll(home) == nil })
	allocator, stop := chromedp.NewExecAllocator(base, append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(chromium), chromedp.NoSandbox, chromedp.DisableGPU, chromedp.Flag("disable-dev-shm-usage", true),
		chromedp.UserDataDir(home), chromedp.WSURLReadTimeout(2*time.Minute),
		chromedp.Env("HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home))...)
	defer stop()
	browser, end := chromedp.NewContext(allocator)
	defer end()
	defer func() {
		if err := chromedp.Cancel(browser); err != nil {
			t.Logf("closing Chromium: %v", err)
		}
	}()
	shows := func(script string) {
		t.Helper()
		var last error
		for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			yes, err := chromedp.Run(browser, chromedp.Evaluate[bool](script))
			if yes && err == nil {
				return
			}
			last = err
		}
		page, _ := chromedp.Run(browser, chromedp.Text(chromedp.CSS("body"))) // what there is of it
		t.Fatalf("not so: %s (%v); the page says:\n%s", script, last, page)
	}
	page := l.page + "/review/" + alert.ID
	if err := chromedp.Do(browser, chromedp.EmulateViewport(1180, 900), chromedp.Navigate(page)); err != nil {
		t.Fatal(err)
	}
	// The page fills in the evidence by itself once the worker behind live work has made it.
	shows(fmt.Sprintf(`document.querySelectorAll(".images figure").length === %d &&
		Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)`, l.components+1))
	shows(`document.querySelector("#evidence").innerText.includes("the rerun gave the stored score")`)
	if err := chromedp.Do(browser, chromedp.Click(chromedp.CSS(`button[value="acknowledge"]`))); err != nil {
		t.Fatal(err)
	}
	shows(`document.querySelector("h1").innerText.includes("acknowledged")`)
	_, errs := l.run(exitFailed, "review", "ack", alert.ID, "--by", "late")
	if !strings.Contains(errs, "acknowledged it already") {
		t.Errorf("a lost race says: %s", errs)
	}
	if err := chromedp.Do(browser,
		chromedp.SendKeys(chromedp.CSS("[data-comment]"), "five different shirts"),
		chromedp.Click(chromedp.CSS(`button[value="confirmed"]`)),
	); err != nil {
		t.Fatal(err)
	}
	shows(`document.querySelector("h1").innerText.includes("confirmed")`)

	// The verdict is an event too.
	verdict, err := schema.DecodeReview(l.next("uncertainty.review.fashion-mnist").Data())
	if err != nil || verdict.AlertID != alert.ID || verdict.Verdict != schema.VerdictConfirmed ||
		verdict.Comment != "five different shirts" || verdict.ClassGap != alert.ClassGap {
		t.Errorf("verdict %+v, %v", verdict, err)
	}

	// The unalerted request is in the queue, unmarked; its verdict comes by the command line.
	var queue []postgres.Review
	natstest.Until(t, "both are in review", func() bool {
		out, _ := l.run(exitOK, "review", "list", "--state=all", "--json")
		queue = nil
		for line := range strings.Lines(out) {
			queue = append(queue, decode[postgres.Review](t, line))
		}
		return len(queue) == 2
	})
	for _, r := range queue {
		if r.EventID != "known" {
			continue
		}
		if r.Kind != "" || r.Severity != "" {
			t.Errorf("the list marks what was drawn at random: %+v", r)
		}
		l.run(exitOK, "review", "comment", r.ID[:12], "a sneaker")
		l.run(exitOK, "review", "resolve", r.ID, "false-alarm", "--by", "grace")
		out, _ := l.run(exitOK, "review", "show", r.ID)
		holds(t, out, "grace resolve as false alarm", "a sneaker")
	}

	// Statistics, by the command line and on the page.
	out, _ := l.run(exitOK, "review", "stats", "--json", "--model=fashion-mnist")
	var stats review.Stats
	if err := json.Unmarshal([]byte(out), &stats); err != nil {
		t.Fatal(err)
	}
	if tally := stats.Tally; tally.Scored != 2 || tally.Alerted != 1 || tally.AlertsConfirmed != 1 ||
		tally.Sampled != 1 || tally.SamplesFalse != 1 {
		t.Errorf("tally %+v", tally)
	}
	precision := stats.Precision
	if !stats.Recall.Known || stats.Recall.Value != 1 || !precision.Known || precision.Value != 1 ||
		precision.Low <= 0 || precision.High != 1 {
		t.Errorf("statistics %+v", stats)
	}
	if err := chromedp.Do(browser, chromedp.Navigate(l.page+"/stats")); err != nil {
		t.Fatal(err)
	}
	shows(`document.querySelector(".estimates").innerText.includes("100.0%")`)

	// A canary is caught, and leaves the queue and the counts as they were.
	if out, _ := l.run(exitOK, "canary", "-e", shipped, "--once", "--deadline=4m"); !strings.Contains(out, "is caught") {
		t.Errorf("canary: %s", out)
	}
	out, _ = l.run(exitOK, "review", "stats", "--json")
	var after review.Stats
	if err := json.Unmarshal([]byte(out), &after); err != nil || after.Tally != stats.Tally {
		t.Errorf("a canary changed the counts: %+v, before %+v, %v", after.Tally, stats.Tally, err)
	}
	if _, err := l.store.AlertByID(t.Context(), alert.ID); err != nil {
		t.Error(err)
	}
}

// Wrong use of the verbs: clear errors, and nothing changed.
func TestReviewVerbsRefuse(t *testing.T) {
	l := &loop{t: t, cfg: app.DefaultConfig()}
	l.cfg.Postgres.URL = pgtest.URL(t)
	for _, c := range []struct {
		code int
		args []string
		want string
	}{
		{exitFailed, []string{"review", "ack", "0123456789abcdef"}, "review 0123456789abcdef: not found"},
		{exitFailed, []string{"review", "show", "nothing"}, "review nothing: not found"},
		{exitUsage, []string{"review", "resolve", "0123456789abcdef", "maybe"}, "must be one of"},
		{exitFailed, []string{"review", "resolve", "0123456789abcdef", "expected"}, "not found"},
		{exitUsage, []string{"review", "stats", "--days=0"}, "--days is 0, must be 1 to 3650"},
		{exitUsage, []string{"review", "list", "--limit=0"}, "--limit is 0"},
		{exitUsage, []string{"review", "list", "--state=lost"}, "must be one of"},
		{exitUsage, []string{"review", "ack", "0123456789abcdef", "--version=-1"}, "--version is -1"},
		{exitUsage, []string{"canary", "-e", shipped, "--every=0s"}, "must be positive"},
	} {
		if _, errs := l.run(c.code, c.args...); !strings.Contains(errs, c.want) {
			t.Errorf("%s: says %q, want %q", strings.Join(c.args, " "), errs, c.want)
		}
	}
	if out, _ := l.run(exitOK, "review", "list"); out != "Nothing waits for a reviewer here.\n" {
		t.Errorf("an empty list prints %q", out)
	}
	if out, _ := l.run(exitOK, "review", "stats"); !strings.Contains(out, "unknown") {
		t.Errorf("statistics of nothing print %q", out)
	}
}
