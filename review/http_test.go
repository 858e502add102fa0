package review_test

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
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
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
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
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn,
		labels: map[string]string{"tenant": `<img src=x onerror="alert(1)">`}})
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
		{"old version", "POST", "/review/" + id, form("do", "acknowledge", "version", "7"), nil, 409,
			"somebody else was faster"},
		{"unknown review", "POST", "/review/00000000", form("do", "acknowledge", "version", "1"), nil, 404, "not found"},
		{"evidence that has not failed", "POST", "/review/" + id, form("do", "evidence", "version", "1"), nil, 404,
			"not found"},
		{"another site", "POST", "/review/" + id, form("do", "acknowledge", "version", "1"),
			map[string]string{"Sec-Fetch-Site": "cross-site"}, 403, ""},
		{"another origin", "POST", "/review/" + id, form("do", "acknowledge", "version", "1"),
			map[string]string{"Origin": "https://evil.example.com"}, 403, ""},
		{"too much", "POST", "/review/" + id, form("do", "comment", "version", "1", "comment", strings.Repeat("x", 70_000)),
			nil, 413, "too long"},
		{"long comment", "POST", "/review/" + id, form("do", "comment", "version", "1", "comment",
			strings.Repeat("x", 5000)), nil, 422, "the most is 4000"},
		{"method", "DELETE", "/review/" + id, nil, nil, 404, ""},
	} {
		status, header, text := ask(t, c.method, site.URL+c.path, c.form, c.headers)
		if status != c.status || !strings.Contains(text, c.says) {
			t.Errorf("%s: %d, want %d that says %q: %.300s", c.name, status, c.status, c.says, text)
		}
		if policy := header.Get("Content-Security-Policy"); !strings.Contains(policy, "default-src 'none'") ||
			strings.Contains(policy, "unsafe") || header.Get("X-Content-Type-Options") != "nosniff" {
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
	if status, header, _ := ask(t, "POST", site.URL+"/review/"+id, form("do", "acknowledge", "version", "1"),
		map[string]string{"Sec-Fetch-Site": "same-origin"}); status != 303 || header.Get("Location") != "/review/"+id {
		t.Errorf("a plain form: %d %v", status, header)
	}
	if status, header, _ := ask(t, "GET", site.URL+"/review/"+id[:10], nil, nil); status != 303 ||
		header.Get("Location") != "/review/"+id {
		t.Errorf("a shortened id: %d %v", status, header)
	}
	// An alert about no single score has a page without buttons.
	if _, err := b.store.RaiseAlert(t.Context(), schema.Alert{ID: "feedfeed", Kind: "summary", Model: "tiny",
		ClassIndex: -1, Severity: schema.SeverityWarn, Reason: "budget", Count: 9, Detail: "nine " +
			"<b>more</b>", FiredAt: time.Now(), EventTime: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if status, _, text := ask(t, "GET", site.URL+"/review/feedfeed", nil, nil); status != 200 ||
		!strings.Contains(text, "nine &lt;b&gt;more") || strings.Contains(text, `value="confirmed"`) {
		t.Errorf("a summary: %d %s", status, text)
	}
}

// With a token: the login, the session, and what a visitor without one gets.
func TestLogin(t *testing.T) {
	b := newBench(t, tiny)
	const token = "a token of some length"
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Token: token}})
	browser := map[string]string{"Accept": "text/html"}
	if status, header, _ := ask(t, "GET", site.URL+"/review/1?x=2", nil, browser); status != 303 ||
		header.Get("Location") != "/login?to=%2Freview%2F1%3Fx%3D2" {
		t.Errorf("%d %v", status, header)
	}
	if status, header, _ := ask(t, "GET", site.URL+"/", nil, nil); status != 401 || header.Get("WWW-Authenticate") == "" {
		t.Errorf("a program: %d %v", status, header)
	}
	for _, form := range []url.Values{{"name": {"ada"}, "token": {"wrong"}}, {"name": {" "}, "token": {token}},
		{"name": {"ada"}}} {
		if status, header, _ := ask(t, "POST", site.URL+"/login", form, nil); status != 403 ||
			header.Get("Set-Cookie") != "" {
			t.Errorf("%v: %d %v", form, status, header)
		}
	}
	status, header, _ := ask(t, "POST", site.URL+"/login",
		url.Values{"name": {"Ada Lovelace"}, "token": {token}, "to": {"/stats"}}, nil)
	cookie, _, _ := strings.Cut(header.Get("Set-Cookie"), ";")
	if status != 303 || header.Get("Location") != "/stats" || cookie == "" {
		t.Fatalf("%d %v", status, header)
	}
	if status, _, text := ask(t, "GET", site.URL+"/stats", nil, map[string]string{"Cookie": cookie}); status != 200 ||
		!strings.Contains(text, "Ada Lovelace") {
		t.Errorf("%d %s", status, text)
	}
	if _, header, _ := ask(t, "POST", site.URL+"/logout", url.Values{},
		map[string]string{"Cookie": cookie}); !strings.Contains(header.Get("Set-Cookie"), "Max-Age=0") {
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
