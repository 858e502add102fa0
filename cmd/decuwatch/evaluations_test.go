package main

import (
	"encoding/hex"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	logspb "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logpb "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// receiver is an OTLP receiver of logs.
type receiver struct {
	*httptest.Server
	mu      sync.Mutex
	records []*logpb.LogRecord
	of      map[string]string // the resource
	keys    []string          // values of the header x-key
}

func receiveLogs(t *testing.T) *receiver {
	t.Helper()
	c := &receiver{of: map[string]string{}}
	c.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var request logspb.ExportLogsServiceRequest
		body, err := io.ReadAll(r.Body)
		if err == nil {
			err = proto.Unmarshal(body, &request)
		}
		if err != nil || r.URL.Path != "/v1/logs" {
			t.Errorf("the receiver got %s: %v", r.URL.Path, err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.keys = append(c.keys, r.Header.Get("X-Key"))
		for _, resource := range request.GetResourceLogs() {
			maps.Copy(c.of, attributes(resource.GetResource().GetAttributes()))
			for _, scope := range resource.GetScopeLogs() {
				c.records = append(c.records, scope.GetLogRecords()...)
			}
		}
	}))
	t.Cleanup(c.Close)
	return c
}

func attributes(list []*commonpb.KeyValue) map[string]string {
	texts := map[string]string{}
	for _, a := range list {
		texts[a.GetKey()] = a.GetValue().GetStringValue()
	}
	return texts
}

// Each measurement of a score is one log event below the producer's span, if the settings ask for it. OTEL_ variables
// say where it goes.
func TestEvaluationsAreSent(t *testing.T) {
	b := newBench(t, natstest.Start(t).URL(), pgtest.URL(t))
	b.stream()
	c := receiveLogs(t)
	w := start(t, []string{
		"OTEL_EXPORTER_OTLP_ENDPOINT=" + c.URL, "OTEL_EXPORTER_OTLP_HEADERS=x-key=secret", "OTEL_BLRP_SCHEDULE_DELAY=50",
		"OTEL_SERVICE_NAME=watcher", "OTEL_RESOURCE_ATTRIBUTES=deployment.environment=test",
	}, append([]string{"serve", "-e", faultEnsemble, "--nats.url=" + b.natsURL, "--postgres.url=" + b.pgURL,
		"--metrics.address=127.0.0.1:0", "--review.address=none", "--scoring.threads=1", "--tracing.evaluations"},
		b.flags...)...)
	metrics := metricsAddress(t, w) + "/metrics"
	_, text := get(t, metrics)
	holds(t, text, `decuwatch_evaluations_total{outcome="dropped"} 0`)

	// One producer puts its span into the event, another into the header of the message.
	const trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	const parent = "00-" + trace + "-" + span + "-01"
	inside := schema.Event{Source: faultSource, ID: "inside", Time: time.Now(), TraceParent: parent,
		Data: schema.Generation{Model: faultModel, Class: schema.ClassIndex(1), Seed: 7}}
	if _, err := schema.Publish(t.Context(), b.js, inside); err != nil {
		t.Fatal(err)
	}
	if _, err := b.js.PublishMsg(t.Context(), &nats.Msg{
		Subject: schema.SubjectGeneration(faultModel), Data: []byte(identityEvent(t, "header", faultModel)),
		Header: nats.Header{"Content-Type": {"application/cloudevents+json"}, "traceparent": {parent}},
	}); err != nil {
		t.Fatal(err)
	}
	b.put(schema.SubjectGeneration(faultModel), identityEvent(t, "alone", faultModel))
	var records []*logpb.LogRecord
	natstest.Until(t, "six events", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		records = slices.Clone(c.records)
		return len(records) >= 6
	})

	labels := map[string]string{}
	for _, r := range records {
		a := attributes(r.GetAttributes())
		id, name := a["gen_ai.response.id"], a["gen_ai.evaluation.name"]
		if r.GetEventName() != "gen_ai.evaluation.result" || a["gen_ai.request.model"] != faultModel ||
			a["cloudevents.event_source"] != faultSource {
			t.Errorf("%s %v", r.GetEventName(), a)
		}
		wantTrace, wantSpan := trace, span
		if id == "alone" {
			wantTrace, wantSpan = "", ""
		}
		if got := hex.EncodeToString(r.GetTraceId()); got != wantTrace || hex.EncodeToString(r.GetSpanId()) != wantSpan {
			t.Errorf("%s %s is below %s %x", id, name, got, r.GetSpanId())
		}
		labels[id+" "+name] = a["gen_ai.evaluation.score.label"]
		column := strings.TrimPrefix(name, "decuwatch.")
		stored := b.query("SELECT " + column + "::text FROM decuwatch.scores WHERE event_id = '" + id + "'")
		for _, kv := range r.GetAttributes() {
			if kv.GetKey() != "gen_ai.evaluation.score.value" {
				continue
			}
			if want := decode[float64](t, stored[0]); kv.GetValue().GetDoubleValue() != want {
				t.Errorf("%s %s is %v, stored %v", id, name, kv.GetValue(), want)
			}
		}
	}
	want := map[string]string{}
	for _, id := range []string{"inside", "header", "alone"} {
		want[id+" decuwatch.class_gap"], want[id+" decuwatch.request_risk"] = "warn", "no_threshold"
	}
	if !maps.Equal(labels, want) {
		t.Errorf("labels are %v, want %v", labels, want)
	}
	if c.of["service.name"] != "watcher" || c.of["deployment.environment"] != "test" || c.keys[0] != "secret" {
		t.Errorf("the resource is %v, the key %q", c.of, c.keys)
	}
	natstest.Until(t, "what was sent is counted", func() bool {
		_, text := get(t, metrics)
		return strings.Contains(text, `decuwatch_evaluations_total{outcome="sent"} 6`)
	})
	w.stop()
}
