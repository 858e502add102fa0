package budget

import (
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// register registers the metrics of the accounts. A nil registerer registers nowhere.
func register(reg prometheus.Registerer, accounts map[string]*account) {
	with := promauto.With(reg)
	for model, a := range accounts {
		gauge := func(name, help string, labels prometheus.Labels, value func(*account) float64) {
			labels["model"] = model
			with.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 {
				a.mu.Lock()
				defer a.mu.Unlock()
				return value(a)
			})
		}
		for period, of := range map[string]func(*account) (size Rows, missing float64){
			"hour": func(a *account) (Rows, float64) { return a.RowsPerHour, a.missing.Hour },
			"day":  func(a *account) (Rows, float64) { return a.RowsPerDay, a.missing.Day },
		} {
			gauge("decuwatch_budget_rows", "Rows that the budget of a model holds, by period; 0 means no bound.",
				prometheus.Labels{"period": period}, func(a *account) float64 { size, _ := of(a); return float64(size) })
			gauge("decuwatch_budget_spent_rows", "Rows that are missing from the budget of a model, by period.",
				prometheus.Labels{"period": period}, func(a *account) float64 { _, missing := of(a); return missing })
		}
		gauge("decuwatch_sampling_share",
			"Share of the events selected by the rules that a budget or max-wait leaves to be scored.",
			prometheus.Labels{}, func(a *account) float64 { return a.share })
		gauge("decuwatch_deferred_events", "Events that wait in the stream because the budget is used up.",
			prometheus.Labels{}, (*account).deferred)
		gauge("decuwatch_deferred_expire_seconds",
			"Time until the stream drops the oldest deferred event; 0 if no event is deferred.",
			prometheus.Labels{}, (*account).expire)
	}
}

// expire returns the seconds until the stream drops the oldest deferred event. The caller has locked the mutex.
func (a *account) expire() float64 {
	switch {
	case a.deferred() == 0:
		return 0
	case a.backlog.MaxAge == 0:
		return math.Inf(1)
	}
	return (a.backlog.MaxAge - a.backlog.Oldest - time.Since(a.seenAt)).Seconds()
}

// deferred returns how many events are deferred. The caller has locked the mutex.
func (a *account) deferred() float64 {
	if a.waiting == 0 {
		return 0
	}
	return float64(max(a.waiting, a.backlog.Events))
}
