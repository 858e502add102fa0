package review_test

import (
	"context"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// servePage serves the page on a free loopback port.
func servePage(t *testing.T, store *postgres.Store, c review.PageConfig) *httptest.Server {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	page, err := review.NewPage(store, listener.Addr(), c)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(page)
	s.Listener.Close()
	s.Listener = listener
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// browser starts Debian's Chromium without a window. It fails if it is missing.
func browser(t *testing.T) context.Context {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("the review page is tested in Chromium, which is missing: run make review-tools (%v)", err)
	}
	home := browserHome(t)
	ctx, cancel := context.WithTimeout(context.Background(), 4*patience)
	t.Cleanup(cancel)
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox,
		chromedp.DisableGPU,
		chromedp.Flag("disable-dev-shm-usage", true), chromedp.Flag("hide-scrollbars", true), chromedp.UserDataDir(home),
		chromedp.WSURLReadTimeout(patience), chromedp.Env("HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home))
	ctx, stop := chromedp.NewExecAllocator(ctx, options...)
	t.Cleanup(stop)
	ctx, end := chromedp.NewContext(ctx)
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Logf("closing Chromium: %v", err)
		}
		end()
	})
	if err := chromedp.Do(ctx); err != nil {
		t.Fatalf("start %s: %v", path, err)
	}
	return ctx
}

// browserHome returns a directory for the browser. Its processes may still write there for a moment when they have been
// told to end, so the removal is tried again until it succeeds.
func browserHome(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "chromium")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var err error
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if err = os.RemoveAll(dir); err == nil {
				return
			}
		}
		t.Errorf("remove the browser's directory: %v", err)
	})
	return dir
}

// tab is the browser's page, with what it complains about.
type tab struct {
	t   *testing.T
	ctx context.Context
	mu  sync.Mutex
	bad []string
}

func newTab(t *testing.T, ctx context.Context) *tab {
	b := &tab{t: t, ctx: ctx}
	complain := func(format string, args ...any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.bad = append(b.bad, fmt.Sprintf(format, args...))
	}
	err := chromedp.Listen(ctx, func(ev any) {
		switch ev := ev.(type) {
		case *cdplog.EventEntryAdded: // a refusal by the content security policy comes here
			if ev.Entry.Level == cdplog.EntryLevelError || ev.Entry.Source == cdplog.EntrySourceSecurity {
				complain("%s %s", ev.Entry.Text, ev.Entry.URL)
			}
		case *runtime.EventExceptionThrown:
			complain("exception: %s", ev.ExceptionDetails.Text)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *tab) run(what string, actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, actions...); err != nil {
		page, _ := chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS("body"))) // what there is of it
		b.t.Fatalf("%s: %v; the page says:\n%s", what, err, page)
	}
}

// says waits until the element's text holds s.
func (b *tab) says(selector, s string) {
	b.t.Helper()
	b.holds(fmt.Sprintf(`document.querySelector(%q).innerText.includes(%q)`, selector, s))
}

// holds waits until the script is true. It fails for as long as a page is on its way to another.
func (b *tab) holds(script string) {
	b.t.Helper()
	var last error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		yes, err := chromedp.Run(b.ctx, chromedp.Evaluate[bool](script))
		if yes && err == nil {
			return
		}
		last = err
	}
	page, _ := chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS("body"))) // what there is of it
	b.t.Fatalf("not so after %s: %s (%v); the page says:\n%s", patience, script, last, page)
}

// shot writes a picture of the page if DECUWATCH_SCREENSHOTS names a directory.
func (b *tab) shot(name string) {
	b.t.Helper()
	dir := os.Getenv("DECUWATCH_SCREENSHOTS")
	if dir == "" {
		return
	}
	png, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
	if err != nil {
		b.t.Fatalf("picture %s: %v", name, err)
	}
	if err = os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// part is shot for one element of the page.
func (b *tab) part(selector, name string) {
	b.t.Helper()
	dir := os.Getenv("DECUWATCH_SCREENSHOTS")
	if dir == "" {
		return
	}
	png, err := chromedp.Run(b.ctx, chromedp.Screenshot(chromedp.CSS(selector)))
	if err != nil {
		b.t.Fatalf("picture %s: %v", name, err)
	}
	if err = os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// dark has the page see a visitor who prefers dark colors.
var dark = chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
	_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "dark"}},
	})
	return err
})

// noComplaints fails if the browser refused or reported something.
func (b *tab) noComplaints() {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.bad {
		b.t.Errorf("the browser complains: %s", s)
	}
}

// The queue, one review, its buttons and keys, in a real browser.
func TestPageInChromium(t *testing.T) {
	b := newBench(t, shipped)
	classes := b.engine.Ensemble().Classes
	limits := map[schema.Severity]float64{}
	for _, severity := range []schema.Severity{schema.SeverityWarn, schema.SeverityCritical} {
		reference := b.engine.Ensemble().Reference
		value := reference[string(schema.ClassGap)].Quantiles["0.99"]
		if severity == schema.SeverityCritical {
			value = reference[string(schema.ClassGap)].Quantiles["0.999"] * 2
		}
		limits[severity] = value
		if _, err := b.store.SetThreshold(t.Context(), schema.Threshold{
			Model: b.engine.Ensemble().Name, EnsembleDigest: b.engine.Ensemble().Digest,
			Settings: b.engine.Profile().Settings(), Measurement: schema.ClassGap,
			Scope: "model", Severity: severity, Value: value, Origin: "manual", SetBy: "test", Reason: "for the page",
		}); err != nil {
			t.Fatal(err)
		}
	}
	var worst schema.Score        // the request that the page shows: of those with an alert, the most disputed
	for seed := range uint64(8) { // what the class's distribution is made of
		for class := range classes {
			score, _ := b.record(request{class: class, seed: seed, ago: time.Hour})
			if risk := score.RequestRisk; class != 3 && risk != nil &&
				score.ClassGap.Value >= limits[schema.SeverityCritical] && (worst.RequestRisk == nil ||
				risk.Value > worst.RequestRisk.Value) {
				worst = score
			}
		}
	}
	const hostile = `"><script>document.title='stolen'</script><img src=x onerror=alert(1)>`
	for i, class := range []int{8, 1, 4, 5, 0} {
		b.record(request{class: class, seed: uint64(200 + i), alert: schema.SeverityWarn,
			ago: time.Duration(5-i) * time.Minute})
	}
	_, quiet := b.record(request{class: 3, seed: 100, sampled: true, ago: 50 * time.Minute})
	_, second := b.record(request{class: 4, seed: 101, alert: schema.SeverityWarn, limit: limits[schema.SeverityWarn],
		labels: map[string]string{"tenant": "acme"}, ago: 12 * time.Minute})
	_, first := b.record(request{class: worst.ClassIndex, seed: worst.Event.Data.Seed, alert: schema.SeverityCritical,
		limit: limits[schema.SeverityCritical], labels: map[string]string{"tenant": hostile, "region": "eu-north-1"}})
	var data []postgres.ClassData
	for i, class := range classes {
		data = append(data, postgres.ClassData{Model: b.engine.Ensemble().Name, EnsembleDigest: b.engine.Ensemble().Digest,
			ClassIndex: i, ClassLabel: class.Label})
	}
	if err := b.store.AddClassData(t.Context(), data); err != nil {
		t.Fatal(err)
	}
	worker, err := review.NewWorker(b.store, []review.Gatherer{b.engine}, review.WorkerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	running(t, worker.Run)
	until(t, "evidence", func() bool {
		s, err := b.store.EvidenceStats(t.Context())
		if err != nil || s.Failed > 0 {
			t.Fatal(s, err)
		}
		return s.Pending == 0
	})
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	p := newTab(t, browser(t))

	// The queue shows them all alike, with nothing that tells the one drawn at random.
	p.run("queue", chromedp.EmulateViewport(1180, 800), chromedp.Navigate(site.URL))
	p.holds(`document.querySelectorAll(".row").length === 8 && 
		Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)`)
	p.says(".tabs", "To do 8")
	p.holds(`!/critical|warn|sample|alert/.test(document.querySelector(".rows").innerText)`)
	p.shot("review-queue")

	// Keys: choose the second row, open it.
	p.run("keys", chromedp.KeyEvent("j"), chromedp.KeyEvent("j"), chromedp.WaitVisible(chromedp.CSS(".row.chosen")),
		chromedp.KeyEvent("\r"))
	p.says("h1", classes[4].Label)
	p.holds(`location.pathname === "/review/` + second + `"`)
	p.run("back", chromedp.KeyEvent("u"))
	p.holds(`location.pathname === "/"`)

	// One review: an image of each member that loads, the heat map over them, what the labels say as text only.
	p.run("open", chromedp.Navigate(site.URL+"/review/"+first))
	p.says("h1", "open")
	p.holds(fmt.Sprintf(`document.querySelectorAll(".images figure").length === %d && 
		Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)`, b.engine.Ensemble().Components+1))
	p.holds(`document.querySelectorAll(".references img").length === 4`)
	p.holds(`getComputedStyle(document.querySelector(".images .heat")).opacity === "0"`)
	p.run("heat", chromedp.KeyEvent("h"))
	p.holds(`getComputedStyle(document.querySelector(".images .heat")).opacity === "1"`)
	p.holds(`!document.getElementById("score").open`)
	p.run("score", chromedp.KeyEvent("s"))
	p.says("#score", "critical")
	p.says("#score", "Higher than")
	p.says("main", hostile)
	p.holds(`document.title.includes("stolen") === false && document.querySelectorAll("main script").length === 0`)

	// Acknowledge by key, comment with the mouse, while somebody else is faster on a second change.
	p.run("acknowledge", chromedp.KeyEvent("a"))
	p.says("h1", "acknowledged")
	p.says(".history", "ada")
	if _, err := (review.Change{Action: review.Assign, Actor: "grace", Assignee: "grace"}).Apply(t.Context(), b.store,
		first); err != nil {
		t.Fatal(err)
	}
	p.run("lost race", chromedp.SendKeys(chromedp.CSS("[data-comment]"), "Boots? No: a shirt with one sleeve."),
		chromedp.Click(chromedp.CSS(`button[value="confirmed"]`)))
	p.says(".flash", "somebody else was faster")
	p.says("h1", "acknowledged")
	if r, err := b.store.ReviewByID(t.Context(), first); err != nil || r.State != schema.ReviewAcknowledged ||
		r.Version != 3 {
		t.Fatalf("a lost race changed the review: %+v, %v", r, err)
	}
	p.run("confirm", chromedp.SendKeys(chromedp.CSS("[data-comment]"), "The components disagree about the shape."),
		chromedp.Click(chromedp.CSS(`button[value="confirmed"]`)))
	p.says("h1", "confirmed")
	p.says(".history", "The components disagree about the shape.")
	p.holds(`document.querySelector(".flash") === null && document.getElementById("score").open`)
	p.run("heat off", chromedp.KeyEvent("h"))
	p.holds(`getComputedStyle(document.querySelector(".images .heat")).opacity === "0"`)
	p.holds(`document.getAnimations().length === 0 || document.getAnimations().every(a => a.playState !== "running")`)
	p.shot("review-alert")
	p.part("#evidence", "review-evidence")

	// False alarm by key on the one drawn at random; its page says what it is only now.
	p.run("drawn", chromedp.Navigate(site.URL+"/review/"+quiet))
	p.says("h1", "open")
	p.run("false alarm", chromedp.KeyEvent("f"))
	p.says("h1", "false alarm")
	p.says("#score", "No alert fired")

	// The filter narrows without a new page, and the counts stay right.
	p.run("filter", chromedp.Navigate(site.URL+"/?state=resolved"))
	p.holds(`document.querySelectorAll(".row").length === 2`)
	p.run("class", chromedp.SetValue(chromedp.CSS(`select[name="class"]`),
		fmt.Sprintf("%s/%d", worst.Event.Data.Model, worst.ClassIndex)),
		chromedp.Evaluate[chromedp.Void](`document.querySelector('select[name="class"]')
			.dispatchEvent(new Event("change", {bubbles: true}))`))
	p.holds(`document.querySelectorAll(".row").length === 1 && location.search.includes("class=")`)
	p.says(".tabs", "Resolved 1")

	p.run("statistics", chromedp.Navigate(site.URL+"/stats"))
	p.says(".estimates", "100.0%")
	p.shot("review-stats")

	// A phone: nothing is wider than the screen, and dark is dark.
	p.run("phone", chromedp.EmulateViewport(390, 844, chromedp.EmulateMobile), dark)
	for path, name := range map[string]string{"/": "review-queue-phone", "/review/" + second: "review-alert-phone",
		"/stats": "review-stats-phone", "/login": "review-login-phone"} {
		p.run(name, chromedp.Navigate(site.URL+path))
		p.holds(`document.documentElement.scrollWidth <= 390 && Array.from(document.images).every(i => i.complete)`)
		if name == "review-alert-phone" {
			p.run("score on a phone", chromedp.Click(chromedp.CSS("#score summary")))
			p.holds(`document.documentElement.scrollWidth <= 390`)
			p.shot(name)
		}
	}
	p.holds(`getComputedStyle(document.body).backgroundColor === "rgb(19, 18, 23)"`)
	// The lost race was answered with 409, which the browser notes and which is meant.
	p.mu.Lock()
	kept := p.bad[:0]
	for _, s := range p.bad {
		if !strings.Contains(s, "409") {
			kept = append(kept, s)
		}
	}
	p.bad = kept
	p.mu.Unlock()
	p.noComplaints()
}
