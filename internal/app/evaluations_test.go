package app

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.opentelemetry.io/otel/log"
)

// A receiver that does not answer holds up nobody: what finds no room is dropped and counted, and so is what could not
// be sent.
func TestEvaluationsAreDropped(t *testing.T) {
	t.Setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "100")
	t.Setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600000")
	answer := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		<-answer
		w.WriteHeader(http.StatusBadRequest)
	}))
	defer server.Close()
	reg := prometheus.NewRegistry()
	logger, flush, err := newEvaluations(t.Context(), TracingConfig{Endpoint: server.URL, Evaluations: true}, reg)
	if err != nil {
		t.Fatal(err)
	}
	for range 250 {
		logger.Emit(t.Context(), log.Record{})
	}
	count := func(outcome string) float64 {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if m.GetLabel()[0].GetValue() == outcome {
					return m.GetCounter().GetValue()
				}
			}
		}
		return -1
	}
	if got := count("dropped"); got != 150 {
		t.Errorf("%v events are dropped, want 150", got)
	}
	close(answer)
	_ = flush() // it reports what was refused, unless that was reported before
	if got := count("failed"); got != 100 {
		t.Errorf("%v events failed, want 100", got)
	}
	if n := testutil.CollectAndCount(reg); n != 3 {
		t.Errorf("%d series, want sent, failed and dropped", n)
	}
}

// Without the setting nothing is sent, and there is no metric.
func TestEvaluationsAreOff(t *testing.T) {
	reg := prometheus.NewRegistry()
	logger, flush, err := newEvaluations(t.Context(), TracingConfig{Endpoint: "http://127.0.0.1:1"}, reg)
	if err != nil || logger.Enabled(t.Context(), log.EnabledParameters{}) || flush() != nil {
		t.Errorf("%v", err)
	}
}
