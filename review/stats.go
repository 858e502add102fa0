package review

import (
	"context"
	"fmt"
	"math"
	"time"

	"gonum.org/v1/gonum/stat/distuv"

	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Estimate is a share with its interval at the confidence level of Stats.
type Estimate struct {
	Value float64 `json:"value"`
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
	Known bool    `json:"known"` // false if nothing was reviewed: the interval is 0 to 1 then
}

// Stats is what the verdicts of a window say about the alerts. Events of canaries are left out.
type Stats struct {
	Model      string               `json:"model,omitempty"`
	From       time.Time            `json:"from"`
	To         time.Time            `json:"to"`
	Confidence float64              `json:"confidence"`
	Tally      postgres.ReviewTally `json:"tally"`
	// Precision is the share of reviewed alerts that were right: confirmed or expected. Wilson's interval.
	Precision Estimate `json:"precision"`
	// MissRate is the share of unalerted requests that an alert should have been on, from those drawn at random. The
	// interval of Clopper and Pearson.
	MissRate Estimate `json:"miss_rate"`
	// Recall is the share of the events that an alert should be on which have one. Every sampled event stands for
	// (unalerted events / reviewed samples) events, and every event for the requests that were sampled out. The interval
	// combines the intervals of precision by event and of miss rate, each at half the error (Bonferroni), so that it
	// covers with at least the confidence.
	Recall Estimate `json:"recall"`
}

// LoadStats reads the tally of the window, widened to whole hours, and estimates. An empty model is all of them.
func LoadStats(ctx context.Context, store *postgres.Store, model string, class *int, from, to time.Time) (Stats,
	error) {
	from = from.UTC().Truncate(time.Hour)
	if end := to.UTC().Truncate(time.Hour); end.Before(to) {
		to = end.Add(time.Hour)
	}
	if !from.Before(to) {
		return Stats{}, fmt.Errorf("the window from %s to %s is empty", from.Format(time.RFC3339), to.Format(time.RFC3339))
	}
	t, err := store.TallyReviews(ctx, model, class, from, to)
	if err != nil {
		return Stats{}, err
	}
	s := estimate(t, 0.95)
	s.Model, s.From, s.To = model, from, to
	return s, nil
}

// estimate returns the statistics of a tally.
func estimate(t postgres.ReviewTally, confidence float64) Stats {
	s := Stats{Confidence: confidence, Tally: t}
	right := t.AlertsConfirmed + t.AlertsExpected
	s.Precision = wilson(float64(right), float64(right+t.AlertsFalse), confidence)
	s.MissRate = clopperPearson(t.SamplesShare*t.SamplesWorth, t.SamplesWorth, confidence)

	half := 1 - (1-confidence)/2
	events := wilson(t.EventsShare*t.EventsWorth, t.EventsWorth, half)
	misses := clopperPearson(t.SamplesShare*t.SamplesWorth, t.SamplesWorth, half)
	unalerted := max(0, t.Requests-t.RequestsAlerted)
	recall := func(precision, miss float64, otherwise float64) float64 {
		found := t.RequestsAlerted * precision
		missed := unalerted * miss
		if found+missed == 0 {
			return otherwise
		}
		return found / (found + missed)
	}
	s.Recall = Estimate{
		Value: recall(events.Value, misses.Value, 0), Low: recall(events.Low, misses.High, 0), High: recall(events.High,
			misses.Low, 1),
		Known: events.Known && misses.Known && events.Value*t.RequestsAlerted+misses.Value*unalerted > 0,
	}
	if t.Alerted == 0 { // nothing was found, whatever there was to find
		s.Recall.Low = 0
	}
	return s
}

// wilson returns k of n, which need not be integers, with Wilson's score interval (E. B. Wilson, 1927).
func wilson(k, n, confidence float64) Estimate {
	if n == 0 {
		return Estimate{Low: 0, High: 1}
	}
	z := distuv.UnitNormal.Quantile(1 - (1-confidence)/2)
	p := k / n
	centre := (p + z*z/(2*n)) / (1 + z*z/n)
	half := z / (1 + z*z/n) * math.Sqrt(p*(1-p)/n+z*z/(4*n*n))
	e := Estimate{Value: p, Low: max(0, centre-half), High: min(1, centre+half), Known: true}
	if k == 0 {
		e.Low = 0
	}
	if k == n {
		e.High = 1
	}
	return e
}

// clopperPearson returns k of n with the exact interval of C. J. Clopper and E. S. Pearson (1934), which covers with at
// least the confidence.
func clopperPearson(k, n, confidence float64) Estimate {
	e := Estimate{Low: 0, High: 1}
	if n == 0 {
		return e
	}
	tail := (1 - confidence) / 2
	e.Value, e.Known = k/n, true
	if k > 0 {
		e.Low = distuv.Beta{Alpha: k, Beta: n - k + 1}.Quantile(tail)
	}
	if k < n {
		e.High = distuv.Beta{Alpha: k + 1, Beta: n - k}.Quantile(1 - tail)
	}
	return e
}
