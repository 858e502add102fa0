package review_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
)

// The page silences a class, a measurement or a model, refuses what it cannot, and ends a silence early. Each silence
// has the reviewer as its author.
func TestSilencesOnThePage(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 1, seed: 1, alert: schema.SeverityWarn})
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	tomorrow := time.Now().UTC().Add(24 * time.Hour).Format("2006-01-02T15:04")
	for _, c := range []struct {
		name, form string
		status     int
		says       string
	}{
		{"no reason", "do=add&class=tiny%2F1&for=1h&reason=+", 422, "the reason is empty"},
		{"long reason", "do=add&class=tiny%2F1&for=1h&reason=" + strings.Repeat("x", 4001), 422, "the most is 4000"},
		{"no such class", "do=add&class=tiny%2F3&for=1h&reason=x", 422, "there is no class"},
		{"no such model", "do=add&class=large&for=1h&reason=x", 422, "there is no class"},
		{"no such measurement", "do=add&class=tiny&measurement=size&for=1h&reason=x", 422, "must be one of"},
		{"no time", "do=add&class=tiny&for=&reason=x", 422, "must be a duration like 4h"},
		{"negative time", "do=add&class=tiny&for=-1h&reason=x", 422, "must be a duration like 4h"},
		{"no such start", "do=add&class=tiny&for=1h&from=noon&reason=x", 422, "must be a time like"},
		{"long ago", "do=add&class=tiny&for=1h&from=2024-01-01T00:00&reason=x", 422, "would have ended already"},
		{"nothing to do", "do=explode", 400, "must be add or end"},
		{"end of nothing", "do=end&id=x", 400, "names no silence"},
		{"end of another", "do=end&id=99", 422, "does not exist"},
		{"unknown parameter", "do=add&author=grace", 400, "author"},
		{"class", "do=add&class=tiny%2F1&measurement=class_gap&for=1h&reason=<b>known</b>", 303, ""},
		{"model", "do=add&class=tiny&for=24h&from=" + tomorrow + "&reason=move", 303, ""},
	} {
		form, err := url.ParseQuery(c.form)
		if err != nil {
			t.Fatal(err)
		}
		status, _, text := ask(t, "POST", site.URL+"/silences", form, nil)
		if status != c.status || !strings.Contains(text, c.says) {
			t.Errorf("%s: %d, want %d that says %q: %s", c.name, status, c.status, c.says, text)
		}
	}
	list, err := b.store.Silences(t.Context(), "", true, 10)
	if err != nil || len(list) != 2 || list[1].Author != "ada" || *list[1].ClassIndex != 1 || !list[1].InForce ||
		list[0].ClassIndex != nil || list[0].InForce || list[0].EndsAt.Sub(list[0].StartsAt) != 24*time.Hour {
		t.Fatalf("%+v, %v", list, err)
	}
	b.record(request{class: 1, seed: 2, alert: schema.SeverityWarn}) // is silenced
	page := func(path string) string {
		t.Helper()
		_, _, text := ask(t, "GET", site.URL+path, nil, nil)
		return strings.Join(strings.Fields(text), " ")
	}
	for _, want := range []string{"class-1", "class gap", "in force", "&lt;b&gt;known&lt;/b&gt;", "1 alert not sent",
		"every class", "to come", "silenced by ada"} {
		if text := page("/silences"); !strings.Contains(text, want) {
			t.Errorf("the page does not say %q: %s", want, text)
		}
	}
	if text := page("/review/" + id); !strings.Contains(text, `href="/silences?class=tiny%2F1"`) {
		t.Errorf("the review does not lead to the silences: %s", text)
	}
	if text := page("/silences?class=tiny%2F1"); !strings.Contains(text, `value="tiny/1" selected`) {
		t.Errorf("the class is not chosen: %s", text)
	}
	for _, want := range []int{303, 422} { // it ends once
		if status, _, text := ask(t, "POST", site.URL+"/silences", url.Values{"do": {"end"}, "id": {"1"}},
			nil); status != want {
			t.Errorf("end: %d, want %d: %s", status, want, text)
		}
	}
	if text := page("/silences"); strings.Contains(text, "in force") {
		t.Errorf("it has ended: %s", text)
	}
	if text := page("/silences?past=yes"); !strings.Contains(text, "ended by ada") {
		t.Errorf("it is not among the past: %s", text)
	}
	if status, _, _ := ask(t, "GET", site.URL+"/silences?past=no", nil, nil); status != http.StatusBadRequest {
		t.Errorf("past=no: %d", status)
	}
}

// A reviewer silences a class in the browser and ends it again.
func TestSilencesInChromium(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 2, seed: 1, alert: schema.SeverityWarn})
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	p := newTab(t, browser(t))
	p.run("review", chromedp.EmulateViewport(1180, 800), chromedp.Navigate(site.URL+"/review/"+id))
	p.run("to silences", chromedp.Click(chromedp.CSS(`a[href="/silences?class=tiny%2F2"]`)))
	p.holds(`location.pathname === "/silences" && document.querySelector("select[name=class]").value === "tiny/2"`)
	p.run("silence", chromedp.SetValue(chromedp.CSS("select[name=for]"), "4h"),
		chromedp.SendKeys(chromedp.CSS("input[name=reason]"), "New in the catalog: everybody knows."),
		chromedp.Click(chromedp.CSS(`button[value="add"]`)))
	p.says(".silences", "New in the catalog")
	p.says(".silences", "in force")
	p.shot("review-silences")
	p.run("end", chromedp.Click(chromedp.CSS(`button[value="end"]`)))
	p.says(".empty", "Nothing is silenced")
	p.noComplaints()
}
