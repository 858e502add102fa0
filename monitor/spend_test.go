package monitor_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/monitor/sampling"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// purse is a budget of rows, with a share in force.
type purse struct {
	rows  int
	share float64
	err   error
}

func (p *purse) Share(context.Context, string, schema.Delivery) (float64, error) {
	return p.share, p.err
}

func (p *purse) Take(_ context.Context, _ string, rows int, _ schema.Delivery) (bool, error) {
	if p.err != nil || p.rows < rows {
		return false, p.err
	}
	p.rows -= rows
	return true, nil
}

func (p *purse) Give(_ string, rows int) { p.rows += rows }

// sparing returns a monitor of the classes Trouser, of which there are few images, and Bag.
func sparing(t *testing.T, rules string, p *purse) (*monitor.Monitor, *recorder, *scorer) {
	t.Helper()
	c := monitor.Config{Registerer: prometheus.NewPedanticRegistry(), Budget: p}
	c.Sampling = sampling.Config{Salt: "salt", FewImages: 10}
	if err := c.Sampling.Rules.UnmarshalText([]byte(rules)); err != nil {
		t.Fatal(err)
	}
	at, err := alerts.NewTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	s, r := &scorer{answer: result}, &recorder{verdicts: map[string]schema.Verdict{}}
	model := monitor.Model{Scorer: s, Classes: []string{"Trouser", "Bag"}, Images: []int{10, 11}, Profile: profile}
	m, err := monitor.New(map[string]monitor.Model{"m": model}, table{at}, r, c)
	if err != nil {
		t.Fatal(err)
	}
	return m, r, s
}

// Every event gets one verdict: a score with its probability, or a skip with the same. The rules and the share in force
// multiply; classes that are spared, and canaries, are scored whatever the share.
func TestSharesDecide(t *testing.T) {
	p := &purse{rows: 1e6, share: 0.5}
	m, r, s := sparing(t, `[{class: Nowhere, share: 0.6}, {share: 0.4}]`, p)
	scored := map[string]int{}
	const n = 300
	for i := range n {
		for _, class := range []string{"Bag", "Trouser", "Nowhere", "Elsewhere"} {
			ev := event(fmt.Sprint(class, i))
			ev.Data.Class = schema.ClassLabel(class)
			err := handle(t.Context(), m, ev, first(1))
			var kinded interface{ DeadLetterKind() schema.DeadLetterKind }
			v, settled := r.verdicts["/s "+ev.ID]
			unknown := class == "Nowhere" || class == "Elsewhere"
			switch {
			case unknown && errors.As(err, &kinded) && kinded.DeadLetterKind() == schema.KindUnknownClass && !settled:
				scored[class]++ // it would have been
			case err != nil || !settled:
				t.Fatalf("%s: %v, settled %t", ev.ID, err, settled)
			case v.Score != nil:
				scored[class]++
				if want := map[string]float64{"Bag": 0.2}[class]; v.Score.InclusionProbability != want {
					t.Fatalf("%s has probability %g, want %g", ev.ID, v.Score.InclusionProbability, want)
				}
			case v.Skip.Reason != schema.SkipSampledOut || v.Skip.InclusionProbability == nil ||
				*v.Skip.InclusionProbability != map[string]float64{"Bag": 0.2, "Nowhere": 0.3}[class]:
				t.Fatalf("%s was skipped: %+v", ev.ID, v.Skip)
			}
		}
	}
	if scored["Trouser"] != n || scored["Elsewhere"] != n || scored["Bag"] < 40 || scored["Bag"] > 80 ||
		scored["Nowhere"] < 60 || scored["Nowhere"] > 120 {
		t.Errorf("of %d events of each class were scored: %v", n, scored)
	}
	canary := event("canary")
	canary.Source = schema.CanarySource
	if err := handle(t.Context(), m, canary, first(1)); err != nil || r.order[len(r.order)-1].Score == nil {
		t.Errorf("a canary is not scored: %v", err)
	}
	if want := scored["Trouser"] + scored["Bag"] + 1; len(s.requests) != want {
		t.Errorf("%d requests were run, want %d", len(s.requests), want)
	}
	if rows := 1e6 - 7*len(s.requests); p.rows != rows {
		t.Errorf("%d rows are left, want %d", p.rows, rows)
	}
}

// An event takes its rows before it is run. Without room it is skipped; what it did not need goes back.
func TestRowsAreTakenAndGivenBack(t *testing.T) {
	p := &purse{rows: 20, share: 1}
	m, r, s := sparing(t, ``, p)
	for i, want := range []int{13, 6, 6} {
		if err := handle(t.Context(), m, event(fmt.Sprint(i)), first(1)); err != nil || p.rows != want {
			t.Errorf("event %d: %d rows are left, want %d: %v", i, p.rows, want, err)
		}
	}
	last := r.order[2].Skip
	if last == nil || last.Reason != schema.SkipBudget || last.InclusionProbability != nil ||
		!strings.Contains(last.Detail, "7 rows") {
		t.Errorf("without room: %+v", last)
	}
	// An event that has its verdict costs nothing.
	p.rows = 7
	if err := handle(t.Context(), m, event("0"), first(1)); err != nil || p.rows != 7 || len(s.requests) != 2 {
		t.Errorf("a known event: %d rows are left, %d requests were run: %v", p.rows, len(s.requests), err)
	}
	s.answer = func(q scoring.Request) (scoring.Result, error) {
		answer, err := result(q)
		answer.Receipt.Rows = 3
		return answer, err
	}
	if err := handle(t.Context(), m, event("short"), first(1)); err != nil || p.rows != 4 {
		t.Errorf("an event that needed 3 rows of 7: %d are left: %v", p.rows, err)
	}
	// What cannot be decided is no verdict.
	p.err = errors.New("the database is away")
	if _, _, err := m.Plan(t.Context(), event("new"), first(1)); !errors.Is(err, p.err) {
		t.Errorf("a budget that cannot be read: %v", err)
	}
	if len(r.order) != 4 {
		t.Errorf("%d verdicts", len(r.order))
	}
}
