package review_test

import (
	"bytes"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
)

// Whatever value a parameter of a route has, the answer is never an error of the server, and what is malformed is
// refused with 400 and the parameter's name.
func TestHostileParameters(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	form := "do=acknowledge&version=1&"
	routes := []struct {
		method, path string
		names        []string
		rest         string // of the form
	}{
		{"GET", "/", []string{"state", "model", "class", "assignee", "severity", "after"}, ""},
		{"GET", "/stats", []string{"model", "days"}, ""},
		{"GET", "/login", []string{"to"}, ""},
		{"POST", "/login", []string{"to", "name"}, ""},
		{"POST", "/review/" + id, []string{"do", "version", "comment", "assignee"}, form},
	}
	malformed := map[string]string{
		"NUL": "%00", "NUL within": "a%00b", "invalid UTF-8": "%ff%fe", "cut UTF-8": "%e2%82", "bad escape": "%zz",
		"control": "a%1bb",
		"repeat":  "a&NAME=b", "repeat of one value": "&NAME=",
	}
	odd := []string{
		"", "-1", "0", "2147483648", "9223372036854775808", "1e309", "NaN", "-Infinity", "1.5", "0x10", "%20", "%27%3B--",
		"../../etc/passwd", "[]", "{}",
		"tiny/-1", "tiny/2147483648", "tiny/99999999999999999999", "tiny/NaN", "/", "tiny/1/2", "0000-01-01T00:00:00Z+x",
		"9999-12-31T23:59:59Z+x",
		"2026-01-01T00:00:00Z+", "infinity+x", strings.Repeat("9", 4000), strings.Repeat("%F0%9F%98%80",
			300), "%E2%80%AE", "%EF%BF%BD",
	}
	send := func(method, path, query string) (int, string) {
		t.Helper()
		address, body := site.URL+path+"?"+query, ""
		if method == http.MethodPost {
			address, body = site.URL+path, query
		}
		r, err := http.NewRequestWithContext(t.Context(), method, address, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if method == http.MethodPost {
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		return do(t, r)
	}
	for _, route := range routes {
		for _, name := range route.names {
			rest := route.rest
			if name == "do" || name == "version" {
				rest = strings.ReplaceAll(rest, name+"=", "comment=")
			}
			for what, value := range malformed {
				query := rest + name + "=" + strings.ReplaceAll(value, "NAME", name)
				status, text := send(route.method, route.path, query)
				if status != 400 || !strings.Contains(text, name) && what != "bad escape" {
					t.Errorf("%s %s, %s of %s: %d: %.200s", route.method, route.path, what, name, status, text)
				}
			}
			for _, value := range odd {
				if status, text := send(route.method, route.path, rest+name+"="+value); status >= 500 {
					t.Errorf("%s %s, %s=%.40s: %d: %.200s", route.method, route.path, name, value, status, text)
				}
			}
		}
		if status, text := send(route.method, route.path, route.rest+"nothing=1"); status != 400 ||
			!strings.Contains(text, "nothing") {
			t.Errorf("%s %s with an unknown parameter: %d: %.200s", route.method, route.path, status, text)
		}
	}
	for _, path := range []string{"/review/%00", "/review/%ff", "/review/" + id + "/evidence/%00",
		"/review/" + id + "/evidence/%ff", "/review/" + strings.Repeat("x", 5000)} {
		if status, _ := send("GET", path, ""); status != 404 {
			t.Errorf("%.40s: %d", path, status)
		}
		if !strings.Contains(path, "evidence") {
			if status, _ := send("POST", path, "do=evidence&version=1"); status != 404 {
				t.Errorf("POST %.40s: %d", path, status)
			}
		}
	}
	for _, kind := range []string{"", "multipart/form-data; boundary=x", "application/json", ";"} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, site.URL+"/review/"+id, strings.NewReader(form))
		if err != nil {
			t.Fatal(err)
		}
		r.Header["Content-Type"] = []string{kind}
		if status, text := do(t, r); status != 400 || !strings.Contains(text, "Content-Type") {
			t.Errorf("content type %q: %d: %.200s", kind, status, text)
		}
	}
	// Several reviews share a prefix.
	conn, err := pgx.Connect(t.Context(), b.url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, other := range []string{"aaaaaaaa1", "aaaaaaaa2"} {
		if _, err := conn.Exec(t.Context(),
			`INSERT INTO decuwatch.reviews (id, kind, source, event_id, event_time, model, ensemble_digest, class_index,
				class_label)
			SELECT $1, 'sample', source, $1, event_time, model, ensemble_digest, class_index, class_label FROM decuwatch.reviews
			WHERE id = $2`, other, id); err != nil {
			t.Fatal(err)
		}
	}
	if status, text := send("GET", "/review/aaaaaaaa", ""); status != 400 ||
		!strings.Contains(text, "several reviews start with it") {
		t.Errorf("an ambiguous id: %d: %.200s", status, text)
	}
	if r, err := b.store.ReviewByID(t.Context(), id); err != nil || r.Verdict != "" {
		t.Errorf("a hostile request resolved the review: %+v, %v", r, err)
	}
}

// A header that decides something is refused if it is given twice: the first value, or the last, is what an attacker
// adds.
func TestHeadersGivenTwice(t *testing.T) {
	b := newBench(t, tiny)
	trusting := servePage(t, b.store, review.PageConfig{Access: review.Access{Header: "X-User",
		Proxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}})
	const token = "a token of some length"
	asking := servePage(t, b.store, review.PageConfig{Access: review.Access{Token: token}})
	for _, c := range []struct {
		name, url string
		headers   http.Header
		status    int
	}{
		{"one user", trusting.URL, http.Header{"X-User": {"ada"}}, 200},
		{"two users", trusting.URL, http.Header{"X-User": {"mallory", "ada"}}, 400},
		{"one user twice", trusting.URL, http.Header{"X-User": {"ada", "ada"}}, 400},
		{"an empty one first", trusting.URL, http.Header{"X-User": {"", "ada"}}, 400},
		{"an empty one last", trusting.URL, http.Header{"X-User": {"ada", ""}}, 400},
		{"two spellings", trusting.URL, http.Header{"x-user": {"mallory"}, "X-User": {"ada"}}, 400},
		{"two users in one", trusting.URL, http.Header{"X-User": {"mallory, ada"}}, 400},
		{"two users in one without space", trusting.URL, http.Header{"X-User": {"mallory,ada"}}, 400},
		{"an empty one before", trusting.URL, http.Header{"X-User": {",ada"}}, 400},
		{"no user", trusting.URL, http.Header{}, 403},
		{"one token", asking.URL, http.Header{"Authorization": {"Bearer " + token}}, 200},
		{"two tokens", asking.URL, http.Header{"Authorization": {"Bearer " + token, "Bearer x"}}, 400},
		{"two origins", trusting.URL, http.Header{"X-User": {"ada"}, "Origin": {trusting.URL, "https://evil.example.com"}},
			400},
		{"two sites", trusting.URL, http.Header{"X-User": {"ada"}, "Sec-Fetch-Site": {"same-origin", "cross-site"}}, 400},
		{"two sessions", asking.URL, http.Header{"Cookie": {"decuwatch_review=a.b.c; decuwatch_review=d.e.f"}}, 400},
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.url+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = c.headers
		if status, text := do(t, r); status != c.status {
			t.Errorf("%s: %d, want %d: %.200s", c.name, status, c.status, text)
		}
	}
}

// Wrong tokens are logged, counted, and not looked at any more after a few, from one address only.
func TestWrongTokens(t *testing.T) {
	b := newBench(t, tiny)
	const token = "a token of some length"
	var log bytes.Buffer
	reg := prometheus.NewRegistry()
	page, err := review.NewPage(b.store, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}, review.PageConfig{
		Access: review.Access{Token: token}, Registerer: reg, Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	login := url.Values{"name": {"ada"}, "token": {"wrong"}}.Encode()
	counts := map[int]int{}
	for i := range 500 {
		method := http.MethodGet
		if i%2 == 0 {
			method = http.MethodPost
		}
		counts[from(page, "192.0.2.1:1000", method, login, "wrong")]++
	}
	if counts[401]+counts[403] < 10 || counts[401]+counts[403] > 20 || counts[429] != 500-counts[401]-counts[403] {
		t.Errorf("500 wrong tokens: %v", counts)
	}
	if status := from(page, "192.0.2.1:2000", http.MethodGet, "", token); status != 429 {
		t.Errorf("the right token from the address that guesses: %d", status)
	}
	if status := from(page, "192.0.2.2:1000", http.MethodGet, "", token); status != 200 {
		t.Errorf("the right token from another address: %d", status)
	}
	if status := from(page, "[2001:db8::1]:1000", http.MethodGet, "", token); status != 200 {
		t.Errorf("the right token over IPv6: %d", status)
	}
	want := fmt.Sprintf("# HELP decuwatch_review_tokens_total "+
		`Tokens given to the review page: right, wrong, or slowed: not looked at after too many wrong ones.
# TYPE decuwatch_review_tokens_total counter
decuwatch_review_tokens_total{outcome="right"} 2
decuwatch_review_tokens_total{outcome="slowed"} %d
decuwatch_review_tokens_total{outcome="wrong"} %d
`, counts[429]+1, counts[401]+counts[403])
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "decuwatch_review_tokens_total"); err != nil {
		t.Error(err)
	}
	if n := strings.Count(log.String(), "wrong token"); n != counts[401]+counts[403] ||
		!strings.Contains(log.String(), "address=192.0.2.1:1000") || strings.Contains(log.String(), token) {
		t.Errorf("%d wrong tokens are logged: %.500s", n, log.String())
	}
}

// from returns the status of a request of an address: with a Bearer token, or a login.
func from(page http.Handler, address, method, form, token string) int {
	path := "/"
	if method == http.MethodPost {
		path = "/login"
	}
	r := httptest.NewRequest(method, path, strings.NewReader(form))
	r.RemoteAddr = address
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	} else {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	page.ServeHTTP(w, r)
	return w.Code
}

// do sends a request and returns status and body.
func do(t *testing.T, r *http.Request) (int, string) {
	t.Helper()
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
	return answer.StatusCode, html.UnescapeString(string(text))
}
