package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/alecthomas/kong"
	"github.com/jackc/pgx/v5"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/reconcile"
	"github.com/decuwatch/decuwatch/monitor/replay"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// shipped is the ensemble that the repository ships.
const shipped = "../../ensembles/fashion-mnist"

// command runs decuwatch as a user would, with servers' addresses in its environment.
type command struct {
	t   *testing.T
	env []string
}

// run runs a verb to its end and expects an exit code.
func (c command) run(code int, args ...string) (stdout, stderr string) {
	c.t.Helper()
	return c.feed("", code, args...)
}

// feed is run with stdin. The verb runs within the test's process.
func (c command) feed(stdin string, code int, args ...string) (stdout, stderr string) {
	c.t.Helper()
	getenv := func(name string) string {
		for _, v := range c.env {
			if value, ok := strings.CutPrefix(v, name+"="); ok {
				return value
			}
		}
		return ""
	}
	defer slog.SetDefault(slog.Default())
	var out, errs bytes.Buffer
	if got := run(c.t.Context(), args, getenv, strings.NewReader(stdin), &out, &errs); got != code {
		c.t.Fatalf("decuwatch %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got, code, &out, &errs)
	}
	return out.String(), errs.String()
}

// process is run in a process of its own.
func (c command) process(code int, args ...string) (stdout, stderr string) {
	c.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	cmd := exec.CommandContext(c.t.Context(), exe, args...)
	cmd.Env = append(append(os.Environ(), mainEnv+"=1"), c.env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run() // its exit code is read below
	if got := cmd.ProcessState.ExitCode(); got != code {
		c.t.Fatalf("decuwatch %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got, code, &out, &errs)
	}
	return out.String(), errs.String()
}

// holds fails unless text contains each of the words.
func holds(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not in:\n%s", w, text)
		}
	}
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in:\n%s", err, text)
	}
	return v
}

// get returns status and body of a page.
func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url) //nolint:noctx // the test has a deadline of its own
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// quickly is get from a client that does not wait long.
func quickly(t *testing.T, url string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(body)
}

// reviewAddress returns the address of a worker's review page.
func reviewAddress(t *testing.T, w *worker) string {
	t.Helper()
	found := regexp.MustCompile(`msg=serving .*review=([0-9.:]+)`).FindStringSubmatch(w.tail())
	if found == nil {
		t.Fatalf("no review page: %s", w.tail())
	}
	return found[1]
}

// metricsAddress waits until a worker serves and returns the address of its metrics.
func metricsAddress(t *testing.T, w *worker) string {
	t.Helper()
	address := regexp.MustCompile(`msg=serving .*metrics=(http://[0-9.:]+)/metrics`)
	var found []string
	natstest.Until(t, "decuwatch serves", func() bool {
		select {
		case <-w.ended:
			t.Fatalf("decuwatch ended: %s\n%s", w.cmd.ProcessState, w.tail())
		default:
		}
		log, err := os.ReadFile(w.log)
		if err != nil {
			t.Fatal(err)
		}
		found = address.FindStringSubmatch(string(log))
		return found != nil
	})
	return found[1]
}

// isReady waits until a worker is ready.
func isReady(t *testing.T, mux string) {
	t.Helper()
	var body string
	defer func() {
		if t.Failed() {
			t.Logf("last answer: %s", body)
		}
	}()
	natstest.Until(t, "ready", func() bool {
		var status int
		status, body = get(t, mux+"/readyz")
		return status == http.StatusOK
	})
}

// notReady waits until a worker is not ready and says all the words.
func notReady(t *testing.T, mux string, words ...string) {
	t.Helper()
	var body string
	defer func() {
		if t.Failed() {
			t.Logf("last answer: %s", body)
		}
	}()
	natstest.Until(t, "not ready: "+strings.Join(words, ", "), func() bool {
		var status int
		status, body = get(t, mux+"/readyz")
		for _, word := range words {
			if !strings.Contains(body, word) {
				return false
			}
		}
		return status == http.StatusServiceUnavailable
	})
}

// A user goes from an empty database to alerts, through every verb.
func TestEventsBecomeAlerts(t *testing.T) {
	nats := natstest.Start(t)
	db := pgtest.EmptyURL(t)
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.URL(), "DECUWATCH_POSTGRES_URL=" + db}}

	out, _ := user.run(exitDifference, "migrate", "status")
	holds(t, out, "there are no tables")
	_, errs := user.run(exitFailed, "serve", "-e", shipped, "--metrics.address=127.0.0.1:0")
	holds(t, errs, "decuwatch migrate")
	out, _ = user.run(exitOK, "migrate")
	holds(t, out, "the tables went from version 0 to")
	out, _ = user.run(exitOK, "migrate", "up")
	holds(t, out, "already")
	user.run(exitOK, "migrate", "status")

	// Two models at once.
	collector, spans := collect(t)
	serve := start(t, user.env, "serve", "--tracing.endpoint="+collector, "-e", shipped, "-e", faultEnsemble,
		"--metrics.address=127.0.0.1:0", "--review.address=127.0.0.1:0", "--metrics.pprof", "--scoring.threads=1",
		"--review.share=0")
	mux := metricsAddress(t, serve)
	holds(t, serve.tail(), "no threshold applies", "decuwatch thresholds from-reference")
	isReady(t, mux)
	for page, want := range map[string]string{"/healthz": "alive", "/debug/pprof/cmdline": ""} {
		if status, body := get(t, mux+page); status != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: %d %s", page, status, body)
		}
	}
	_, metrics := get(t, mux+"/metrics")
	holds(t, metrics,
		`decuwatch_events_total{model="fashion-mnist",outcome="score",reason="none"} 0`,
		`decuwatch_events_total{model="tiny",outcome="score",reason="none"} 0`,
		`decuwatch_ready{part="ensemble"} `, `decuwatch_ready{part="nats"} `, `decuwatch_ready{part="pulling"} `,
		`decuwatch_sampler_rows_total{kind="live",model="tiny"} 0`, `decuwatch_outbox_pending{sink="nats"} 0`,
		`decuwatch_redeliveries_total{model="tiny"} 0`, `decuwatch_threshold_age_seconds{model="fashion-mnist"} 0`,
		`decuwatch_dead_letters_total{kind="invalid"} 0`, "decuwatch_build_info{",
		`decuwatch_score_count{class="Bag",measurement="class_gap",model="fashion-mnist"} 0`,
		`decuwatch_saturated_scores_total{measurement="class_gap",model="tiny"} 0`)
	for _, stage := range []string{"decode", "queue", "score", "decide", "commit", "ack", "publish"} {
		holds(t, metrics, fmt.Sprintf(`decuwatch_stage_seconds_count{stage=%q} 0`, stage))
	}

	// Thresholds, while it runs.
	out, _ = user.run(exitOK, "thresholds", "list")
	holds(t, out, "There are no thresholds")
	set := []string{"thresholds", "set", shipped, "--measurement=class_gap", "--reason=a test", "--by=tester"}
	_, errs = user.run(exitUsage, append(set, "--value=1", "--class=Submarine")...)
	holds(t, errs, "Submarine")
	_, errs = user.run(exitUsage, append(set, "--value=NaN")...)
	holds(t, errs, "finite")
	user.run(exitOK, append(set, "--value=1e-9", "--severity=critical", "--class=Coat")...)
	out, _ = user.run(exitOK, "thresholds", "list", "--model=fashion-mnist")
	holds(t, out, "class 4", "critical", "1e-09", "manual", "tester", "a test")
	if th := decode[schema.Threshold](t, first(user.run(exitOK, "thresholds", "list", "--json"))); th.Reason != "a test" {
		t.Errorf("threshold %+v", th)
	}
	natstest.Until(t, "the monitor follows the thresholds", func() bool {
		_, metrics := get(t, mux+"/metrics")
		return !strings.Contains(metrics, `decuwatch_threshold_age_seconds{model="fashion-mnist"} 0`+"\n")
	})

	// Events: one by flags, the same again, a file of others, and broken ones that never leave.
	_, errs = user.run(exitUsage, "publish", "--model=fashion-mnist", "--class=Coat", "--seed=1", "--steps=100000")
	holds(t, errs, "data.sampler.steps")
	out, _ = user.run(exitOK, "publish", "--model=fashion-mnist", "--class=Coat", "--seed=1", "--id=coat",
		"--source=/tests", "--label=tenant=acme")
	holds(t, out, "published coat of /tests")
	_, errs = user.feed("{\"class\":3,\"seed\":1}\n\n{\"class\":3,\"sed\":1}\n",
		exitUsage, "publish", "-", "--model=fashion-mnist")
	holds(t, errs, "stdin:3", "data.sed")
	file := filepath.Join(t.TempDir(), "events.jsonl")
	lines := `{"class":"Bag","seed":2}
{"model":"tiny","class":1,"seed":18446744073709551615}
{"class":99,"seed":3}
{"class":"Bag","seed":4,"sampler":{"name":"euler","steps":30,"guidance_scale":7.5,"eta":0}}
{"specversion":"1.0","type":"io.decuwatch.generation.requested.v1","source":"/tests","id":"whole",` +
		`"time":"2026-05-01T00:00:00Z","traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",` +
		`"data":{"model":"fashion-mnist","class":4,"seed":5}}
`
	if err := os.WriteFile(file, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	out, _ = user.run(exitOK, "publish", file, "--model=fashion-mnist")
	holds(t, out, "published 5 events")

	var sides reconcile.Report
	natstest.Until(t, "every event has its verdict and every alert is published", func() bool {
		sides = decode[reconcile.Report](t, first(user.run(exitOK, "reconcile", "--json")))
		return sides.Waiting == 0 && sides.Messages == 6 && sides.Published == 2
	})
	if sides.Scores != 5 || sides.DeadLetters != 1 || sides.Alerts != 2 {
		t.Errorf("reconciled %+v, want 5 scores, 1 dead letter, 2 alerts", sides)
	}
	out, _ = user.run(exitOK, "reconcile")
	holds(t, out, "Both sides agree.", "2 alerts, 2 published, 0 held back, 0 owed, 0 lost, 0 unknown")

	// A dead letter of an unknown model can be redelivered, and becomes a dead letter again.
	user.run(exitOK, "publish", "--model=nobody", "--class=1", "--seed=1", "--id=homeless")
	natstest.Until(t, "the event of an unknown model is a dead letter", func() bool {
		out, _ := user.run(exitOK, "redeliver", "--model=nobody")
		return strings.Contains(out, "1 events can be published again")
	})
	out, _ = user.run(exitOK, "redeliver", "--kind=unknown_model", "--apply", "--by=alice")
	holds(t, out, "unknown_model", "homeless", "was published again as message",
		"1 events were published again, 0 cannot be")
	natstest.Until(t, "it has its new verdict", func() bool {
		out, _ := user.run(exitOK, "redeliver", "--model=nobody")
		return strings.Contains(out, "1 events can be published again")
	})
	out, _ = user.run(exitDifference, "redeliver", "123456")
	holds(t, out, "123456\tis not among the dead letters")
	user.run(exitOK, "reconcile")

	// Alerts.
	out, _ = user.run(exitOK, "watch", "--all", "--no-follow")
	holds(t, out, "critical", "Coat", "class_gap", "class_threshold", "coat")
	for filter, want := range map[string]int{
		"--class=coat": 2, "--class=4": 2, "--class=Bag": 0, "--severity=critical": 2, "--severity=warn": 0,
		"--model=tiny": 0, "--since=1h": 2,
	} {
		args := []string{"watch", "--no-follow", "--json", filter}
		if !strings.HasPrefix(filter, "--since") {
			args = append(args, "--all")
		}
		out, _ := user.run(exitOK, args...)
		if got := strings.Count(out, "\n"); got != want {
			t.Errorf("watch %s: %d alerts, want %d:\n%s", filter, got, want, out)
		}
		if want > 0 {
			a := decode[schema.Alert](t, strings.SplitN(out, "\n", 2)[0])
			if a.ClassLabel != "Coat" || a.Threshold != 1e-9 || a.Receipt.EnsembleDigest == "" {
				t.Errorf("alert %+v", a)
			}
		}
	}

	// A stored score, replayed and scored offline.
	out, _ = user.run(exitOK, "replay", "-e", shipped, "coat")
	holds(t, out, "class_gap", "request_risk", "agrees")
	r := decode[replay.Replay](t, first(user.run(exitOK, "replay", "-e", shipped, "--json", "--source=/tests", "coat")))
	if !r.Agrees || r.Stored.Receipt.Carrier != r.Recomputed.Receipt.Carrier || r.Difference > 1e-3 {
		t.Errorf("replayed %+v", r)
	}
	offline := decode[scoreView](t, first(user.run(exitOK, "score", "-e", shipped, "--class=Coat", "--seed=1", "--id=coat",
		"--source=/tests")))
	if d := math.Abs(offline.ClassGap.Value-r.Stored.ClassGap.Value) / r.Stored.ClassGap.Value; d > 1e-3 {
		t.Errorf("scored offline: %v, stored %v", offline.ClassGap.Value, r.Stored.ClassGap.Value)
	}
	_, errs = user.run(exitFailed, "replay", "-e", faultEnsemble, "coat")
	holds(t, errs, "the score was made by the ensemble fashion-mnist")
	_, errs = user.run(exitFailed, "replay", "-e", shipped, "nobody")
	holds(t, errs, "no score is stored")

	// SIGTERM.
	if text := openMetrics(t, mux+"/metrics"); !strings.Contains(text, `# {trace_id="`) {
		t.Errorf("no latency has an exemplar:\n%s", text)
	}
	serve.stop()
	holds(t, serve.tail(), "stopping")
	traced := map[string]string{} // parents of the spans of the event that came with a trace
	for _, s := range spans() {
		if hex.EncodeToString(s.GetTraceId()) == "0af7651916cd43dd8448eb211c80319c" {
			traced[s.GetName()] = hex.EncodeToString(s.GetParentSpanId())
		}
	}
	for _, name := range []string{"consume", "handle", "score", "commit", "ack", "publish"} {
		if traced[name] == "" {
			t.Errorf("the event's trace has no span %s: %v", name, traced)
		}
	}
	if traced["consume"] != "b7ad6b7169203331" {
		t.Errorf("consume is below %s, want the producer's span", traced["consume"])
	}

	// Differences are found: a score that nobody computed, a verdict that is gone.
	conn, err := pgx.Connect(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	falsify(t, conn)
	out, _ = user.run(exitDifference, "replay", "-e", shipped, "false")
	holds(t, out, "does NOT agree")
	if _, err := conn.Exec(t.Context(), `DELETE FROM decuwatch.events WHERE event_id = 'whole'`); err != nil {
		t.Fatal(err)
	}
	out, _ = user.run(exitDifference, "reconcile")
	holds(t, out, "whole of /tests", "has no verdict", "do NOT agree")
	if _, err := conn.Exec(t.Context(), `DELETE FROM decuwatch.alerts WHERE event_id = 'coat'`); err != nil {
		t.Fatal(err)
	}
	out, _ = user.run(exitDifference, "reconcile")
	holds(t, out, "unknown to Postgres")

	if err := conn.Close(t.Context()); err != nil { // its temporary tables depend on the others
		t.Fatal(err)
	}
	_, errs = user.run(exitUsage, "migrate", "down")
	holds(t, errs, "--yes")
	user.run(exitOK, "migrate", "down", "--yes")
	user.run(exitDifference, "migrate", "status")
}

// collect starts a collector of spans and returns its address and what it received.
func collect(t *testing.T) (string, func() []*tracepb.Span) {
	t.Helper()
	var mu sync.Mutex
	var spans []*tracepb.Span
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var request collectorpb.ExportTraceServiceRequest
		body, err := io.ReadAll(r.Body)
		if err == nil {
			err = proto.Unmarshal(body, &request)
		}
		if err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("collector got %s: %v", r.URL.Path, err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, resource := range request.GetResourceSpans() {
			for _, scope := range resource.GetScopeSpans() {
				spans = append(spans, scope.GetSpans()...)
			}
		}
	}))
	t.Cleanup(collector.Close)
	return collector.URL, func() []*tracepb.Span {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(spans)
	}
}

// openMetrics returns a page of metrics in the format that carries exemplars.
func openMetrics(t *testing.T, url string) string {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	resp, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// falsify stores the score of "coat" again as the score of "false", with another value.
func falsify(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	for _, statement := range []string{
		`CREATE TEMPORARY TABLE copied AS SELECT * FROM decuwatch.scores WHERE event_id = 'coat'`,
		`UPDATE pg_temp.copied SET event_id = 'false', class_gap = class_gap * 1.5`,
		`INSERT INTO decuwatch.scores SELECT * FROM pg_temp.copied`,
		`CREATE TEMPORARY TABLE ledger AS SELECT * FROM decuwatch.events WHERE event_id = 'coat'`,
		`UPDATE pg_temp.ledger SET event_id = 'false', sequence = 1000000`,
		`INSERT INTO decuwatch.events SELECT * FROM pg_temp.ledger`,
	} {
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

func first(stdout, _ string) string { return stdout }

func TestDemo(t *testing.T) {
	user := command{t: t}
	dir := filepath.Join(t.TempDir(), "demo")
	args := []string{
		"demo", "--dir", dir, "--ensemble", shipped, "--requests=20",
		"--nats-port=0", "--metrics-port=0", "--review-port=0",
	}
	out, _ := user.process(exitOK, args...)
	holds(t, out, "published  20 requests over 10 classes", "class gap    from", "alerted",
		"class_gap: warn from", "Ankle boot", "The last alerts:",
		"Reconciled: 20 messages in the stream = 20 scores + 0 skips + 0 dead letters + 0 repeats",
		"psql 'postgres://", "nats://127.0.0.1:", "/readyz")
	table, _, _ := strings.Cut(out, "The last alerts:")
	for line := range strings.Lines(table) {
		if utf8.RuneCountInString(line) > 120 {
			t.Errorf("wider than 120 columns: %s", line)
		}
	}
	out, _ = user.process(exitOK, args...)
	holds(t, out, "as they stood", "Reconciled: 40 messages in the stream = 40 scores")
}

func TestScoreOffline(t *testing.T) {
	user := command{t: t}
	for _, c := range []struct {
		name  string
		code  int
		args  []string
		words []string
	}{
		{"by index", exitOK, []string{"--class=0", "--seed=1"},
			[]string{`"class_label": "T-shirt/top"`, `"profile": "fixed"`, `"runtime": "onnxruntime`}},
		{"as requested", exitOK,
			[]string{"--class=0", "--seed=1", "--scoring.profile=as-requested", "--steps=8", "--guidance=3"},
			[]string{`"profile": "as-requested"`, "ddim g=3 eta=0 class_gap=paide-w2@0+1/8:posterior:shared"}},
		{"another sampler", exitOK, []string{"--class=0", "--seed=1", "--sampler=euler"},
			[]string{"euler was replaced by ddim"}},
		{"another sampler, skipped", exitOK,
			[]string{"--class=0", "--seed=1", "--sampler=euler", "--scoring.unreproducible=skip"},
			[]string{`"skip"`, `"reason": "sampler"`}},
		{"another generator, skipped", exitOK,
			[]string{"--class=0", "--seed=1", "--noise=jax", "--scoring.unreproducible=skip"},
			[]string{`"reason": "noise"`}},
		{"unknown class", exitUsage, []string{"--class=Submarine", "--seed=1"}, []string{"--class", "Submarine"}},
		{"out of bounds", exitUsage, []string{"--class=0", "--seed=1", "--steps=5000"},
			[]string{"data.sampler.steps", "1000"}},
		{"negative seed", exitUsage, []string{"--class=0", "--seed=-1"}, []string{"seed"}},
		{"no class", exitUsage, []string{"--seed=1"}, []string{"--class"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, errs := command{t: t}.run(c.code, append([]string{"score", "-e", shipped}, c.args...)...)
			holds(t, out+errs, c.words...)
		})
	}
	one := first(user.run(exitOK, "score", "-e", shipped, "--class=3", "--seed=9"))
	two := first(user.run(exitOK, "score", "-e", shipped, "--class=Dress", "--seed=9"))
	if a, b := decode[scoreView](t, one), decode[scoreView](t, two); a.ClassGap.Value != b.ClassGap.Value {
		t.Errorf("index and label of one class score %v and %v", a.ClassGap.Value, b.ClassGap.Value)
	}
}

func TestEnsembleVerbs(t *testing.T) {
	user := command{t: t}
	out, _ := user.run(exitOK, "ensemble", "inspect", shipped)
	holds(t, out, "fashion-mnist", "4 tables of 10 classes", "Ankle boot", "5000", "reference class_gap")
	out, _ = user.run(exitOK, "ensemble", "inspect", "../../scoring/testdata/tiny-2")
	holds(t, out, "3 tables around the producer's", "random weights: on nothing", "reference image_risk", "3.16",
		"0.5 (cannot tell)", "a high disagreement of the members says")
	v := decode[map[string]json.RawMessage](t, first(user.run(exitOK, "ensemble", "inspect", "--json", shipped)))
	if v["digest"] == nil || v["manifest"] == nil {
		t.Errorf("inspect --json has the fields %v", v)
	}
	out, _ = user.run(exitOK, "ensemble", "verify", shipped)
	holds(t, out, "is sound")

	// A file that is not what the manifest says: refused by every verb, with the reason.
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.CopyFS(broken, os.DirFS(faultEnsemble)); err != nil {
		t.Fatal(err)
	}
	graph := filepath.Join(broken, "unet.onnx")
	content, err := os.ReadFile(graph)
	if err != nil {
		t.Fatal(err)
	}
	content[len(content)/2] ^= 1
	if err := os.WriteFile(graph, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"ensemble", "verify", broken}, {"ensemble", "inspect", broken}, {"score", "-e", broken, "--class=0", "--seed=1"},
		{"serve", "-e", broken, "--metrics.address=127.0.0.1:0"},
	} {
		_, errs := user.run(exitFailed, args...)
		holds(t, errs, "unet.onnx", "SHA-256")
	}
}

func TestWrongCallsAreExplained(t *testing.T) {
	user := command{t: t}
	_, errs := user.process(exitUsage, "frobnicate")
	holds(t, errs, "frobnicate")
	for _, c := range []struct {
		code  int
		args  []string
		words []string
	}{
		{exitOK, []string{"--help"}, []string{"Usage: decuwatch", "serve", "demo", "Exit codes"}},
		{exitOK, []string{"version"}, []string{"decuwatch ", "ONNX Runtime"}},
		{exitUsage, nil, []string{"expected one of"}},
		{exitUsage, []string{"serve", "--no-such-flag"}, []string{"--no-such-flag", "decuwatch serve --help"}},
		{exitUsage, []string{"serve"}, []string{"scoring.ensembles"}},
		{exitUsage, []string{"serve", "-e", shipped, "--log.level=loud"}, []string{"log.level"}},
		{exitUsage, []string{"serve", "-e", shipped, "--metrics.address=nowhere"}, []string{"metrics.address"}},
		{exitUsage, []string{"publish"}, []string{"--model"}},
		{exitUsage, []string{"publish", "--model=m", "--class=1"}, []string{"--seed"}},
		{exitUsage, []string{"publish", "-", "--seed=1"}, []string{"lines say what they are"}},
		{exitUsage, []string{"publish", "-", "--steps=20"}, []string{"lines say what they are"}},
		{exitUsage, []string{"publish", "-", "--id=one"}, []string{"lines say what they are"}},
		{exitUsage, []string{"demo", "--requests=0"}, []string{"--requests"}},
		{exitUsage, []string{"version", "--config=/no/such/file"}, []string{"/no/such/file"}},
		{exitUsage, []string{"redeliver", "--kind=invalid"},
			[]string{`--kind is "invalid", must be orphaned, unknown_model, given_up, failed`}},
		{exitUsage, []string{"redeliver", "--apply"}, []string{"--apply needs a selection"}},
		{exitUsage, []string{"redeliver", "--from=9", "--to=3"}, []string{"--to is 3, must be at least --from, 9"}},
		{exitFailed, []string{"reconcile", "--nats.url=nats://127.0.0.1:1"},
			[]string{"connect to NATS at nats://127.0.0.1:1"}},
		{exitFailed, []string{"watch", "--nats.url=nats://user:secret@127.0.0.1:1"},
			[]string{"connect to NATS at nats://127.0.0.1:1"}},
		{exitFailed, []string{"migrate", "--postgres.url=postgres://127.0.0.1:1/x"}, []string{"127.0.0.1:1"}},
		{exitUsage, []string{"score", "-e", "/no/such/ensemble", "--class=0", "--seed=1"}, []string{"/no/such/ensemble"}},
	} {
		out, errs := user.run(c.code, c.args...)
		holds(t, out+errs, c.words...)
		if strings.Contains(errs, "secret") {
			t.Errorf("the password is printed: %s", errs)
		}
	}
	// Each verb's help has an example.
	for _, verb := range []string{
		"serve", "demo", "publish", "watch", "score", "replay", "reconcile", "thresholds list", "thresholds set",
		"ensemble inspect", "ensemble verify", "migrate",
	} {
		out, _ := user.run(exitOK, append(strings.Fields(verb), "--help")...)
		holds(t, out, "decuwatch "+verb, "xample")
	}
	// No verb's help names a value by its Go type.
	for _, verb := range leaves(t) {
		out, _ := user.run(exitOK, append(verb, "--help")...)
		if word := regexp.MustCompile(`=(FLOAT|U?INT|STRING|BOOL|[A-Z]+-NAME)\b.*`).FindString(out); word != "" {
			t.Errorf("decuwatch %s --help names a value by its type: %s", strings.Join(verb, " "), word)
		}
	}
	// A second demo in one directory is refused.
	dir := t.TempDir()
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { //nolint:gosec // a file descriptor is small
		t.Fatal(err)
	}
	_, errs = user.run(exitFailed, "demo", "--dir", dir, "--ensemble", shipped)
	holds(t, errs, "another demo runs")
}

// leaves returns the words of every verb.
func leaves(t *testing.T) (verbs [][]string) {
	t.Helper()
	parser, err := kong.New(&cli{}, app.Documented(), names)
	if err != nil {
		t.Fatal(err)
	}
	for _, leaf := range parser.Model.Leaves(true) {
		verbs = append(verbs, strings.Fields(leaf.FullPath())[1:])
	}
	return verbs
}

// A monitor that starts before NATS is there is not ready, and goes to work once it comes.
func TestServeWaitsForNATS(t *testing.T) {
	nats := natstest.Start(t)
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.URL(), "DECUWATCH_POSTGRES_URL=" + pgtest.URL(t)}}
	nats.Stop()
	serve := start(t, user.env, "serve", "-e", faultEnsemble, "--metrics.address=127.0.0.1:0",
		"--review.address=127.0.0.1:0", "--scoring.threads=1")
	mux := metricsAddress(t, serve)
	natstest.Until(t, "it says that NATS is away", func() bool {
		status, body := get(t, mux+"/readyz")
		return status == http.StatusServiceUnavailable && strings.Contains(body, "nats: not connected\n")
	})
	nats.Restart()
	natstest.Until(t, "ready", func() bool {
		status, _ := get(t, mux+"/readyz")
		return status == http.StatusOK
	})
	user.run(exitOK, "publish", "--model=tiny", "--class=1", "--seed=1")
	natstest.Until(t, "the event is scored", func() bool {
		_, metrics := get(t, mux+"/metrics")
		return strings.Contains(metrics, `decuwatch_events_total{model="tiny",outcome="score",reason="none"} 1`)
	})
	serve.stop()
}
