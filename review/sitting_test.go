package review_test

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// clears has a reviewer clear ten alerts from a queue with the keyboard alone, one key for each verdict. The queue
// holds the reviews want in this order. The reviewer begins with the review at start, whose page of the queue is shown.
func (b *tab) clears(store *postgres.Store, want []string, start int) {
	b.t.Helper()
	keys := []string{"c", "f", "e"}
	verdicts := []schema.ReviewVerdict{schema.VerdictConfirmed, schema.VerdictFalseAlarm, schema.VerdictExpected}
	b.run("choose", chromedp.KeyEvent("j"), chromedp.WaitVisible(chromedp.CSS(".row.chosen")), chromedp.KeyEvent("\r"))
	on := func(n int) {
		b.t.Helper()
		b.holds(`location.pathname === "/review/` + want[n] + `" && document.readyState === "complete"`)
		b.says(".progress", fmt.Sprintf("%d of %d", n+1, len(want)))
	}
	for n := range 10 {
		on(start + n)
		b.run("verdict", chromedp.KeyEvent(keys[n%3]))
	}
	on(start + 10)
	for n, id := range want {
		r, err := store.ReviewByID(b.t.Context(), id)
		verdict := schema.ReviewVerdict("")
		if n >= start && n < start+10 {
			verdict = verdicts[(n-start)%3]
		}
		if err != nil || r.Verdict != verdict {
			b.t.Errorf("alert %d got the verdict %q, want %q: %v", n, r.Verdict, verdict, err)
		}
	}
	// z takes the tenth back and returns to it.
	last := start + 9
	b.says(".undo", "confirmed")
	b.run("undo", chromedp.KeyEvent("z"))
	on(last)
	if r, err := store.ReviewByID(b.t.Context(), want[last]); err != nil || r.State != schema.ReviewOpen {
		b.t.Errorf("after undo it is %s, %v", r.State, err)
	}
	// Another verdict goes on from there.
	b.run("verdict", chromedp.KeyEvent("f"))
	on(start + 10)
	b.run("undo", chromedp.KeyEvent("z"))
	on(last)
	// u returns to the queue, with the row chosen; from there the keys go on.
	b.run("back", chromedp.KeyEvent("u"))
	b.holds(`location.pathname === "/" && document.readyState === "complete" &&
		document.querySelector(".row.chosen").id === "r-` + want[last] + `"`)
}

// queueWith is the script that is true on the queue with these parameters.
func queueWith(parameters map[string]string) string {
	script := `location.pathname === "/" && document.readyState === "complete"`
	for name, value := range parameters {
		script += fmt.Sprintf(` && new URLSearchParams(location.search).get(%q) === %q`, name, value)
	}
	return script
}

// A reviewer clears ten alerts from a filtered queue with the keyboard alone. Each verdict lands on the right alert, in
// the queue's order, and the last verdict can be taken back.
func TestTenVerdictsWithTheKeyboard(t *testing.T) {
	b := newBench(t, tiny)
	var want []string // of the filtered queue, the newest first
	for i := range 24 {
		severity := []schema.Severity{schema.SeverityWarn, schema.SeverityCritical}[i/2%2]
		_, id := b.record(request{class: i % 2, seed: uint64(i), alert: severity, both: i%4 == 3 && i%3 == 0,
			ago: time.Duration(30-i) * time.Minute})
		if i%2 == 1 && severity == schema.SeverityCritical {
			want = append([]string{id}, want...)
		}
	}
	for i := range 6 {
		_, id := b.record(request{class: 1, seed: uint64(40 + i), alert: schema.SeverityCritical})
		want = append([]string{id}, want...)
	}
	if len(want) != 12 {
		t.Fatalf("%d alerts match the filter", len(want))
	}
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	p := newTab(t, browser(t))
	p.run("queue", chromedp.EmulateViewport(1180, 800),
		chromedp.Navigate(site.URL+"/?class=tiny%2F1&severity=critical"))
	p.holds(`document.readyState === "complete" && document.querySelectorAll(".row").length === 12`)
	p.says("footer", "1 to 12 of 12")
	p.run("select all", chromedp.KeyEvent("X"))
	p.holds(`document.querySelectorAll(".pick:checked").length === 12 &&
		getComputedStyle(document.querySelector(".bulk")).display === "flex"`)
	p.shot("review-bulk")
	p.axe("a selection")
	p.run("select nothing", chromedp.KeyEvent("X"))
	p.holds(`document.querySelectorAll(".pick:checked").length === 0`)
	p.clears(b.store, want, 0)
	p.holds(queueWith(map[string]string{"class": "tiny/1", "severity": "critical"}))
	p.run("next row", chromedp.KeyEvent("j"))
	p.holds(`document.querySelector(".row.chosen").id === "r-` + want[10] + `"`)
	p.run("open", chromedp.KeyEvent("\r"))
	p.holds(`location.pathname === "/review/` + want[10] + `" && document.readyState === "complete"`)
	p.run("skip", chromedp.KeyEvent("j"))
	p.holds(`location.pathname === "/review/` + want[11] + `" && document.readyState === "complete"`)
	p.run("previous", chromedp.KeyEvent("k"))
	p.holds(`location.pathname === "/review/` + want[10] + `" && document.readyState === "complete"`)
	p.run("skip", chromedp.KeyEvent("j"))
	p.holds(`location.pathname === "/review/` + want[11] + `" && document.readyState === "complete"`)
	p.run("last", chromedp.KeyEvent("f")) // nothing comes after it: back to the queue
	p.holds(`location.pathname === "/" && document.querySelectorAll(".row").length === 2`)
	p.says(".undo", "false alarm")
	p.run("undo from the queue", chromedp.KeyEvent("z"))
	p.holds(`location.pathname === "/review/` + want[11] + `" && document.readyState === "complete"`)
	p.noComplaints()
}

// The same from the second page of a queue, in other orders, and from what a search finds.
func TestTenVerdictsFromPagesOrdersAndSearches(t *testing.T) {
	b := newBench(t, tiny)
	gaps := map[string]float64{}
	var byClass [3][]string // the oldest first
	for i := range 45 + 12 + 28 {
		class, tenant := min(i/45, 1), "acme"
		if i >= 45+12 {
			class, tenant = 2, []string{"acme", "globex"}[i%2]
		}
		score, id := b.record(request{class: class, seed: uint64(i), alert: schema.SeverityWarn,
			labels: map[string]string{"tenant": tenant}, ago: time.Duration(200-i) * time.Minute})
		gaps[id] = score.ClassGap.Value
		if tenant == "acme" {
			byClass[class] = append(byClass[class], id)
		}
	}
	newest := slices.Clone(byClass[0])
	slices.Reverse(newest)
	highest := slices.SortedFunc(slices.Values(byClass[2]), func(x, y string) int {
		return cmp.Or(-cmp.Compare(gaps[x], gaps[y]), cmp.Compare(x, y))
	})
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	p := newTab(t, browser(t))
	p.run("queue", chromedp.EmulateViewport(1180, 800), chromedp.Navigate(site.URL+"/?class=tiny%2F0"))
	p.says("footer", "1 to 30 of 45")
	p.holds(`document.readyState === "complete"`)
	p.run("second page", chromedp.KeyEvent("n"))
	p.holds(`document.readyState === "complete" && document.querySelectorAll(".row").length === 15`)
	p.says("footer", "31 to 45 of 45")
	p.says("footer", "Newer")
	p.clears(b.store, newest, 30)
	p.holds(queueWith(map[string]string{"class": "tiny/0"}))
	p.says("footer", "31 to 36 of 36") // the second page: nine were resolved on it
	p.run("first page", chromedp.KeyEvent("p"))
	p.says("footer", "1 to 30 of 36")
	for query, c := range map[string]struct {
		want       []string
		parameters map[string]string
	}{
		"/?class=tiny%2F1&order=oldest": {byClass[1], map[string]string{"class": "tiny/1", "order": "oldest"}},
		"/?class=tiny%2F2&order=class_gap&search=tenant%3Dacme": {highest, map[string]string{"class": "tiny/2",
			"order": "class_gap", "search": "tenant=acme"}},
	} {
		p.run("queue", chromedp.Navigate(site.URL+query))
		p.says("footer", fmt.Sprintf("1 to %d of %d", len(c.want), len(c.want)))
		p.holds(`document.readyState === "complete"`)
		p.clears(b.store, c.want, 0)
		p.holds(queueWith(c.parameters))
	}
	p.noComplaints()
}

// axe runs axe-core on the page and returns what it finds.
func (b *tab) axe(name string) {
	b.t.Helper()
	script, err := os.ReadFile("../.tools/javascript/node_modules/axe-core/axe.min.js")
	if err != nil {
		b.t.Fatalf("axe-core is missing: run make review-tools (%v)", err)
	}
	b.run("axe", chromedp.Evaluate[chromedp.Void](string(script)+"; void 0"))
	b.run("run axe", chromedp.Evaluate[chromedp.Void](`axe.run().then(r => { document.axeFound = r.violations.map(
		v => v.id + ": " + v.nodes.map(n => n.html + " " + n.failureSummary).join("; ")).join("\n") }); void 0`))
	b.holds(`document.axeFound !== undefined`)
	found, err := chromedp.Run(b.ctx, chromedp.Evaluate[string](`document.axeFound`))
	if err != nil {
		b.t.Fatal(err)
	}
	if found != "" {
		b.t.Errorf("axe-core on %s: %s", name, found)
	}
}

// axe-core finds nothing, in light and dark colors and on a phone, where notices leave room for the queue and no label
// of a chart is cut off.
func TestAccessibility(t *testing.T) {
	b := newBench(t, shipped)
	var id string
	for i := range 3 {
		_, id = b.record(request{class: i, seed: uint64(i), alert: schema.SeverityCritical, both: true})
	}
	for i := range 6 {
		if _, err := b.store.RaiseAlert(t.Context(), schema.Alert{ID: fmt.Sprintf("feed%04d", i), Kind: "class_drift",
			Model: b.engine.Ensemble().Name, ClassIndex: i, ClassLabel: b.engine.Ensemble().Classes[i].Label,
			Severity: schema.SeverityWarn, Reason: "class_drift", Detail: strings.Repeat("It rose far above the others. ", 9),
			FiredAt: time.Now(), EventTime: time.Now()}); err != nil {
			t.Fatal(err)
		}
	}
	worker, err := review.NewWorker(b.store, []review.Gatherer{b.engine}, review.WorkerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	running(t, worker.Run)
	until(t, "evidence", func() bool {
		s, err := b.store.EvidenceStats(t.Context())
		return err == nil && s.Pending == 0
	})
	five := 5
	for _, silence := range []postgres.Silence{{ClassIndex: &five, ClassLabel: "Sandal"}, {StartsAt: time.Now().Add(
		time.Hour)}} {
		silence.Model, silence.Author, silence.Reason = b.engine.Ensemble().Name, "ada", "known, and on its way out"
		if _, err := b.store.AddSilence(t.Context(), silence, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	p := newTab(t, browser(t))
	pages := map[string]string{
		"queue": "/?class=", "alert": "/review/" + id + "?in=", "statistics": "/stats", "notice": "/review/feed0001",
		"login": "/login", "silences": "/silences",
	}
	look := func(how string) {
		for name, path := range pages {
			p.run(name, chromedp.Navigate(site.URL+path))
			p.holds(`document.readyState === "complete"`)
			if name == "alert" {
				p.run("open", chromedp.Evaluate[chromedp.Void](
					`document.querySelectorAll("details").forEach(d => { d.open = true }); void 0`))
			}
			p.axe(name + " in " + how)
			p.shot("axe-" + name + "-" + strings.ReplaceAll(how, " ", "-"))
		}
	}
	p.run("wide", chromedp.EmulateViewport(1180, 800))
	look("light")
	p.run("phone", chromedp.EmulateViewport(390, 844, chromedp.EmulateMobile))
	look("light on a phone")
	p.run("alert", chromedp.Navigate(site.URL+pages["alert"]))
	p.holds(`document.readyState === "complete"`)
	p.run("open", chromedp.Click(chromedp.CSS("#score summary")))
	p.holds(`Array.from(document.querySelectorAll("svg.plot text")).every(text => {
		const box = text.getBBox(), view = text.ownerSVGElement.viewBox.baseVal
		return box.x >= view.x && box.x + box.width <= view.x + view.width &&
			box.y >= view.y && box.y + box.height <= view.y + view.height
	})`)
	p.run("queue", chromedp.Navigate(site.URL+"/"))
	p.holds(`document.querySelector(".row").getBoundingClientRect().bottom < 844 &&
		document.querySelector(".notices summary").innerText.startsWith("6 notices")`)
	p.run("dark", dark)
	look("dark on a phone")
	p.run("wide", chromedp.EmulateViewport(1180, 800))
	look("dark")

	// An image is enlarged, and a notice dismissed.
	p.run("alert", chromedp.Navigate(site.URL+pages["alert"]))
	p.run("enlarge", chromedp.Click(chromedp.CSS(".images a")))
	p.holds(`document.getElementById("large").open && document.querySelector("#large img").width > 300`)
	p.run("queue", chromedp.Navigate(site.URL+"/"), chromedp.Click(chromedp.CSS(".notices summary")),
		chromedp.Click(chromedp.CSS(".notice button")))
	p.says(".notices summary", "5 notices")
	p.noComplaints()
}

// Two alerts on one request are one entry with one verdict and one rerun. Each alert's id leads to it, and nothing in
// the list tells such a request from one that was drawn at random.
func TestOneEntryPerRequest(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn, both: true})
	_, _ = b.record(request{class: 0, seed: 2, sampled: true})
	list, err := b.store.Reviews(t.Context(), postgres.ReviewFilter{})
	if err != nil || len(list) != 2 {
		t.Fatalf("%d entries, want 2: %v", len(list), err)
	}
	if stats, err := b.store.EvidenceStats(t.Context()); err != nil || stats.Pending != 2 {
		t.Errorf("%d reruns are owed, want 2: %v", stats.Pending, err)
	}
	d, err := review.Load(t.Context(), b.store, id)
	if err != nil || len(d.Alerts) != 2 || d.Alerts[0].Severity != schema.SeverityCritical {
		t.Fatalf("%d alerts, the first is %v, %v", len(d.Alerts), d.Alert, err)
	}
	if d.ID != d.Alerts[0].ID {
		t.Errorf("the review is %s, the most severe alert is %s", d.ID, d.Alerts[0].ID)
	}
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	for _, a := range d.Alerts {
		for _, id := range []string{a.ID, a.ID[:12]} {
			if r, err := b.store.ReviewByID(t.Context(), id); err != nil || r.ID != d.ID {
				t.Errorf("alert %s leads to review %s, %v", id, r.ID, err)
			}
		}
	}
	if status, header, _ := ask(t, "GET", site.URL+"/review/"+d.Alerts[1].ID, nil, nil); status != 303 ||
		header.Get("Location") != "/review/"+d.ID {
		t.Errorf("%d %v", status, header)
	}
	if _, err := (review.Change{Action: review.Resolve, Actor: "ada", Verdict: schema.VerdictConfirmed}).Apply(
		t.Context(), b.store, d.Alerts[1].ID); err != nil {
		t.Fatal(err)
	}
	if _, err := (review.Change{Action: review.Resolve, Actor: "ada", Verdict: schema.VerdictFalseAlarm}).Apply(
		t.Context(), b.store, d.Alerts[0].ID); err == nil {
		t.Error("the request was resolved twice")
	}
	due, err := b.store.OutboxNext(t.Context(), schema.SinkStream, 10, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range due {
		if m.Subject != "uncertainty.review.tiny" {
			continue
		}
		v, err := schema.DecodeReview(m.Body)
		if err != nil || len(v.AlertIDs) != 2 || v.AlertID != d.ID {
			t.Errorf("the verdict names the alerts %v, %v", v.AlertIDs, err)
		}
	}
	tally, err := b.store.TallyReviews(t.Context(), "", nil, time.Now().Add(-2*time.Hour), time.Now().Add(2*time.Hour))
	if err != nil || tally.AlertsConfirmed != 1 || tally.EventsTrue != 1 || tally.AlertsOpen != 0 {
		t.Errorf("%+v, %v", tally, err)
	}
}

// Search, orders and pages of the queue, and its CSV.
func TestQueueSearchesAndSorts(t *testing.T) {
	b := newBench(t, tiny)
	var ids []string
	gaps := map[string]float64{}
	for i := range 65 {
		tenant := []string{"acme", "=cmd()"}[i%2]
		score, id := b.record(request{class: i % 2, seed: uint64(i), alert: schema.SeverityWarn,
			labels: map[string]string{"tenant": tenant}, ago: time.Duration(100-i) * time.Minute})
		ids, gaps[id] = append(ids, id), score.ClassGap.Value
	}
	count := func(search string) int {
		counts, err := b.store.ReviewCounts(t.Context(), postgres.ReviewFilter{Search: search})
		if err != nil {
			t.Fatal(err)
		}
		return counts[schema.ReviewOpen]
	}
	for search, want := range map[string]int{"acme": 33, "tenant=ACME": 33, "tenant=acm": 0, "event-65": 1, "EVENT-6": 7,
		ids[4][:10]: 1, "%": 0, "nowhere": 0, "'": 0} {
		if got := count(search); got != want {
			t.Errorf("search for %q finds %d, want %d", search, got, want)
		}
	}
	for _, order := range postgres.ReviewOrders() {
		f := postgres.ReviewFilter{Order: order, Limit: 20}
		var pages [][]postgres.Review
		for {
			page, err := b.store.Reviews(t.Context(), f)
			if err != nil {
				t.Fatal(err)
			}
			if len(page) == 0 {
				break
			}
			pages = append(pages, page)
			f.After = &page[len(page)-1].Place
		}
		if len(pages) != 4 || len(pages[3]) != 5 {
			t.Fatalf("%s: %d pages", order, len(pages))
		}
		if order == postgres.ReviewOldest && pages[0][0].ID != ids[0] {
			t.Errorf("the oldest is %s, want %s", pages[0][0].ID, ids[0])
		}
		last := pages[0][0]
		for _, page := range pages {
			for _, r := range page {
				if order == "class_gap" && gaps[r.ID] > gaps[last.ID] {
					t.Errorf("%s comes after %s", r.ID, last.ID)
				}
				last = r
			}
		}
		// Newer: the page before the third is the second.
		f.After, f.Before = nil, &pages[2][0].Place
		page, err := b.store.Reviews(t.Context(), f)
		if err != nil || len(page) != 20 || page[0].ID != pages[1][0].ID || page[19].ID != pages[1][19].ID {
			t.Errorf("%s: the page before is another: %v", order, err)
		}
	}
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	_, _, text := ask(t, "GET", site.URL+"/?order=oldest&search=acme", nil, nil)
	if !strings.Contains(text, "1 to 30 of 33") || !strings.Contains(text, ">Newer</a>") {
		t.Errorf("the page: %s", text)
	}
	status, _, text := ask(t, "GET", site.URL+"/queue.csv?class=tiny%2F1", nil, nil)
	rows, err := csv.NewReader(strings.NewReader(text)).ReadAll()
	if status != http.StatusOK || err != nil || len(rows) != 33 {
		t.Fatalf("CSV: %d, %d rows, %v", status, len(rows), err)
	}
	for _, row := range rows[1:] {
		if row[4] != "1" || row[16] != "" || !strings.Contains(row[9], "=cmd()") || row[9][0] == '=' {
			t.Errorf("row %q", row)
		}
	}
}

// Several reviews are changed together. What changed meanwhile is left alone and named.
func TestBulk(t *testing.T) {
	b := newBench(t, tiny)
	var ids []string
	for i := range 4 {
		_, id := b.record(request{class: 0, seed: uint64(i), alert: schema.SeverityWarn})
		ids = append(ids, id)
	}
	if _, err := (review.Change{Action: review.Acknowledge, Actor: "grace"}).Apply(t.Context(), b.store,
		ids[2]); err != nil {
		t.Fatal(err)
	}
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	status, _, text := ask(t, "POST", site.URL+"/?severity=warn", url.Values{"do": {"false_alarm"},
		"comment": {"a batch of tests"}, "pick": {ids[0] + " 1", ids[1] + " 1", ids[2] + " 1"}}, nil)
	if status != http.StatusConflict || !strings.Contains(text, "Changed 2 of 3 reviews") ||
		!strings.Contains(text, "somebody else was faster") {
		t.Errorf("%d %s", status, text)
	}
	for i, want := range []schema.ReviewState{"resolved", "resolved", "acknowledged", "open"} {
		if r, err := b.store.ReviewByID(t.Context(), ids[i]); err != nil || r.State != want {
			t.Errorf("review %d is %s, want %s: %v", i, r.State, want, err)
		}
	}
	if status, _, _ := ask(t, "POST", site.URL+"/", url.Values{"do": {"false_alarm"}}, nil); status != 409 {
		t.Errorf("nothing selected: %d", status)
	}
	form := url.Values{"do": {"false_alarm"}, "pick": {ids[3]}}
	if status, _, _ := ask(t, "POST", site.URL+"/", form, nil); status != 400 {
		t.Errorf("no version: %d", status)
	}
}
