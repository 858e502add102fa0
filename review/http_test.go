package review_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// ask sends one request and returns status, headers and body.
func ask(t *testing.T, method, address string, form url.Values, headers map[string]string) (int, http.Header, string) {
	t.Helper()
	var body io.Reader
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	r, err := http.NewRequestWithContext(t.Context(), method, address, body)
	if err != nil {
		t.Fatal(err)
	}
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for name, value := range headers {
		r.Header.Set(name, value)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	answer, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, answer.Header, string(text)
}

// What the page answers to wrong and hostile requests, without a browser's help.
func TestPageRefuses(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn, labels: map[string]string{"tenant": `<img src=x onerror="alert(1)">`}})
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	form := func(pairs ...string) url.Values {
		v := url.Values{}
		for i := 0; i < len(pairs); i += 2 {
			v.Set(pairs[i], pairs[i+1])
		}
		return v
	}
	for _, c := range []struct {
		name, method, path string
		form               url.Values
		headers            map[string]string
		status             int
		says               string
	}{
		{"no such page", "GET", "/nothing", nil, nil, 404, "There is no such page"},
		{"no such review", "GET", "/review/0000000000000000", nil, nil, 404, "not found"},
		{"no such evidence", "GET", "/review/" + id + "/evidence/..%2f..%2fetc", nil, nil, 404, "not found"},
		{"NUL", "GET", "/review/a%00b", nil, nil, 404, "not found"},
		{"no such state", "GET", "/?state=lost", nil, nil, 400, "no state"},
		{"no such class", "GET", "/?class=tiny", nil, nil, 400, "no class"},
		{"no such severity", "GET", "/?severity=high", nil, nil, 400, "no severity"},
		{"no such place", "GET", "/?after=x", nil, nil, 400, "no place"},
		{"days", "GET", "/stats?days=0", nil, nil, 400, "must be 1 to 3650"},
		{"no version", "POST", "/review/" + id, form("do", "acknowledge"), nil, 400, "names no version"},
		{"no action", "POST", "/review/" + id, form("do", "explode", "version", "1"), nil, 422, "no action"},
		{"old version", "POST", "/review/" + id, form("do", "acknowledge", "version", "7"), nil, 409, "somebody else was faster"},
		{"unknown review", "POST", "/review/00000000", form("do", "acknowledge", "version", "1"), nil, 404, "not found"},
		{"evidence that has not failed", "POST", "/review/" + id, form("do", "evidence", "version", "1"), nil, 404, "not found"},
		{"another site", "POST", "/review/" + id, form("do", "acknowledge", "version", "1"), map[string]string{"Sec-Fetch-Site": "cross-site"}, 403, ""},
		{"another origin", "POST", "/review/" + id, form("do", "acknowledge", "version", "1"), map[string]string{"Origin": "https://evil.example.com"}, 403, ""},
		{"too much", "POST", "/review/" + id, form("do", "comment", "version", "1", "comment", strings.Repeat("x", 70_000)), nil, 413, "too long"},
		{"long comment", "POST", "/review/" + id, form("do", "comment", "version", "1", "comment", strings.Repeat("x", 5000)), nil, 422, "the most is 4000"},
		{"method", "DELETE", "/review/" + id, nil, nil, 404, ""},
	} {
		status, header, text := ask(t, c.method, site.URL+c.path, c.form, c.headers)
		if status != c.status || !strings.Contains(text, c.says) {
			t.Errorf("%s: %d, want %d that says %q: %.300s", c.name, status, c.status, c.says, text)
		}
		if policy := header.Get("Content-Security-Policy"); !strings.Contains(policy, "default-src 'none'") || strings.Contains(policy, "unsafe") || header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: headers %v", c.name, header)
		}
	}
	if r, err := b.store.ReviewByID(t.Context(), id); err != nil || r.Version != 1 {
		t.Errorf("a refused request changed the review: %+v, %v", r, err)
	}
	_, _, text := ask(t, "GET", site.URL+"/review/"+id, nil, nil)
	if strings.Contains(text, "<img src=x") || !strings.Contains(text, "&lt;img src=x onerror=") {
		t.Error("a label is not escaped")
	}
	if strings.Contains(text, "style=") || strings.Contains(text, "onclick") || strings.Count(text, "<script") != 2 {
		t.Error("the page holds inline styles or scripts")
	}
	// A form without a script, and a shortened id.
	if status, header, _ := ask(t, "POST", site.URL+"/review/"+id, form("do", "acknowledge", "version", "1"), map[string]string{"Sec-Fetch-Site": "same-origin"}); status != 303 || header.Get("Location") != "/review/"+id {
		t.Errorf("a plain form: %d %v", status, header)
	}
	if status, header, _ := ask(t, "GET", site.URL+"/review/"+id[:10], nil, nil); status != 303 || header.Get("Location") != "/review/"+id {
		t.Errorf("a shortened id: %d %v", status, header)
	}
	// An alert about no single score has a page without buttons.
	if _, err := b.store.RaiseAlert(t.Context(), schema.Alert{ID: "feedfeed", Kind: "summary", Model: "tiny", ClassIndex: -1, Severity: schema.SeverityWarn, Reason: "budget", Count: 9, Detail: "nine <b>more</b>", FiredAt: time.Now(), EventTime: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if status, _, text := ask(t, "GET", site.URL+"/review/feedfeed", nil, nil); status != 200 || !strings.Contains(text, "nine &lt;b&gt;more") || strings.Contains(text, `value="confirmed"`) {
		t.Errorf("a summary: %d %s", status, text)
	}
}

// With a token: the login, the session, and what a visitor without one gets.
func TestLogin(t *testing.T) {
	b := newBench(t, tiny)
	const token = "a token of some length"
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Token: token}})
	browser := map[string]string{"Accept": "text/html"}
	if status, header, _ := ask(t, "GET", site.URL+"/review/1?x=2", nil, browser); status != 303 || header.Get("Location") != "/login?to=%2Freview%2F1%3Fx%3D2" {
		t.Errorf("%d %v", status, header)
	}
	if status, header, _ := ask(t, "GET", site.URL+"/", nil, nil); status != 401 || header.Get("WWW-Authenticate") == "" {
		t.Errorf("a program: %d %v", status, header)
	}
	for _, form := range []url.Values{{"name": {"ada"}, "token": {"wrong"}}, {"name": {" "}, "token": {token}}, {"name": {"ada"}}} {
		if status, header, _ := ask(t, "POST", site.URL+"/login", form, nil); status != 403 || header.Get("Set-Cookie") != "" {
			t.Errorf("%v: %d %v", form, status, header)
		}
	}
	status, header, _ := ask(t, "POST", site.URL+"/login", url.Values{"name": {"Ada Lovelace"}, "token": {token}, "to": {"/stats"}}, nil)
	cookie, _, _ := strings.Cut(header.Get("Set-Cookie"), ";")
	if status != 303 || header.Get("Location") != "/stats" || cookie == "" {
		t.Fatalf("%d %v", status, header)
	}
	if status, _, text := ask(t, "GET", site.URL+"/stats", nil, map[string]string{"Cookie": cookie}); status != 200 || !strings.Contains(text, "Ada Lovelace") {
		t.Errorf("%d %s", status, text)
	}
	if _, header, _ := ask(t, "POST", site.URL+"/logout", url.Values{}, map[string]string{"Cookie": cookie}); !strings.Contains(header.Get("Set-Cookie"), "Max-Age=0") {
		t.Errorf("%v", header)
	}
}

// The vendored script is the one that was published.
func TestVendoredScript(t *testing.T) {
	script, err := os.ReadFile("static/htmx.min.js")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("page.go")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(script)
	if !strings.Contains(string(code), hex.EncodeToString(sum[:])) {
		t.Errorf("static/htmx.min.js has the SHA-256 %x, page.go names another", sum)
	}
}

// Canaries: one that an alert fires on is caught, one that none fires on raises one alert, whoever decides.
func TestCanary(t *testing.T) {
	b := newBench(t, tiny)
	manifest := &b.engine.Ensemble().Manifest
	var mu sync.Mutex
	var sent []schema.Event
	publish := func(_ context.Context, ev schema.Event) error {
		mu.Lock()
		defer mu.Unlock()
		if _, _, err := schema.Encode(ev); err != nil {
			return err
		}
		sent = append(sent, ev)
		return nil
	}
	reg := prometheus.NewRegistry()
	k, err := review.NewCanary(b.store, publish, []*ensemble.Manifest{manifest}, review.CanaryConfig{Deadline: time.Hour, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	caught, err := k.Send(t.Context(), "tiny")
	if err != nil {
		t.Fatal(err)
	}
	rare, err := review.CanaryClasses(manifest)
	if err != nil || len(sent) != 1 || sent[0].ID != caught.EventID || sent[0].Data.Class.Index != caught.ClassIndex || sent[0].Data.Labels[schema.LabelCanary] == "" {
		t.Fatalf("%+v, %v", sent, err)
	}
	if closed, err := k.Decide(t.Context()); err != nil || len(closed) != 0 {
		t.Errorf("decided before its time: %+v, %v", closed, err)
	}
	score, _ := b.record(request{class: rare[0], seed: 1})
	score.Event = sent[0]
	b.n++
	b.commit(score, request{class: rare[0], alert: schema.SeverityWarn})
	if closed, err := k.Decide(t.Context()); err != nil || len(closed) != 1 || closed[0].Outcome != postgres.CanaryCaught {
		t.Errorf("%+v, %v", closed, err)
	}

	late, err := review.NewCanary(b.store, publish, []*ensemble.Manifest{manifest}, review.CanaryConfig{Deadline: time.Microsecond})
	if err != nil {
		t.Fatal(err)
	}
	missed, err := late.Send(t.Context(), "tiny")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var decided int
	for range 4 { // several processes look at once
		wg.Go(func() {
			closed, err := k.Decide(t.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			decided += len(closed)
			mu.Unlock()
		})
	}
	wg.Wait()
	raised, err := b.store.Alerts(t.Context(), postgres.AlertFilter{Kind: schema.AlertCanaryMissed})
	if err != nil || decided != 1 || len(raised) != 1 || raised[0].EventID != missed.EventID || raised[0].Severity != schema.SeverityCritical || !strings.Contains(raised[0].Detail, "was not scored") {
		t.Errorf("%d decided, alerts %+v, %v", decided, raised, err)
	}
	if counts, err := b.store.CanaryCounts(t.Context(), "tiny", time.Now().Add(-time.Hour)); err != nil || counts["caught"] != 1 || counts["missed"] != 1 {
		t.Errorf("%v, %v", counts, err)
	}
	if err := testutil.CollectAndCompare(reg, strings.NewReader(`# HELP decuwatch_canaries_total Canaries by outcome: caught by an alert in time, or missed.
# TYPE decuwatch_canaries_total counter
decuwatch_canaries_total{model="tiny",outcome="caught"} 1
decuwatch_canaries_total{model="tiny",outcome="missed"} 1
`), "decuwatch_canaries_total"); err != nil {
		t.Error(err)
	}
	if _, err := review.NewCanary(b.store, publish, []*ensemble.Manifest{{Name: "even", Classes: []ensemble.Class{{Images: []int{5}}, {Images: []int{6}}}}}, review.CanaryConfig{}); !errors.Is(err, review.ErrNoCanary) {
		t.Errorf("an ensemble without a rare class: %v", err)
	}
	// Run publishes at once, decides by itself, and ends when it is told.
	quick, err := review.NewCanary(b.store, publish, []*ensemble.Manifest{manifest}, review.CanaryConfig{Every: time.Hour, Deadline: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	running(t, quick.Run)
	until(t, "another canary is missed", func() bool {
		counts, err := b.store.CanaryCounts(t.Context(), "tiny", time.Now().Add(-time.Hour))
		return err == nil && counts["missed"] == 2
	})
}
