package schema_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
)

func TestDecodeLine(t *testing.T) {
	whole := `{"specversion":"1.0","type":"io.decuwatch.generation.requested.v1","source":"/a","id":"1",` +
		`"time":"2026-05-01T00:00:00Z","data":{"model":"tiny","class":1,"seed":5}}`
	for _, c := range []struct{ name, line, model, source, want, wrong string }{
		{"whole event", whole, "other", "/a", "tiny", ""},
		{"data", `{"model":"tiny","class":1,"seed":5}`, "", "/default", "tiny", ""},
		{"data without a model", `{"class":1,"seed":5}`, "other", "/default", "other", ""},
		{"no model at all", `{"class":1,"seed":5}`, "", "", "", "data.model"},
		{"unknown field", `{"model":"tiny","class":1,"sed":5}`, "", "", "", "data.sed"},
		{"not JSON", `seed 5`, "", "", "", "not a JSON object"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, err := schema.DecodeLine([]byte(c.line), "/default", c.model)
			if c.wrong != "" {
				if err == nil || !strings.Contains(err.Error(), c.wrong) {
					t.Fatalf("error is %v, want %s", err, c.wrong)
				}
				return
			}
			if err != nil || e.Source != c.source || e.Data.Model != c.want || e.ID == "" || e.Data.Seed != 5 {
				t.Errorf("%+v, %v", e, err)
			}
		})
	}
}

func TestPublishAll(t *testing.T) {
	js, _, _, ctx := stream(t)
	events := make([]schema.Event, 20)
	for i := range events {
		events[i] = schema.NewEvent("/tests", schema.Generation{Model: "tiny", Class: schema.ClassIndex(1), Seed: uint64(i)})
	}
	done := make(chan struct{}, len(events))
	stored, repeated, err := schema.PublishAll(ctx, js, events, 4, func() { done <- struct{}{} })
	if err != nil || stored != 20 || repeated != 0 || len(done) != 20 {
		t.Errorf("stored %d, repeated %d, done %d, %v", stored, repeated, len(done), err)
	}
	stored, repeated, err = schema.PublishAll(ctx, js, events, 4, func() {})
	if err != nil || stored != 20 || repeated != 20 {
		t.Errorf("again: stored %d, repeated %d, %v", stored, repeated, err)
	}
	events[0].Time = time.Time{}
	var invalid *schema.Invalid
	if _, _, err := schema.PublishAll(ctx, js, events, 4, func() {}); !errors.As(err, &invalid) {
		t.Errorf("an invalid event: %v", err)
	}
	ended, end := context.WithCancel(ctx)
	end()
	if stored, _, err := schema.PublishAll(ended, js, events[1:], 4, func() {}); stored != 0 ||
		!errors.Is(err, context.Canceled) {
		t.Errorf("after the context ended: stored %d, %v", stored, err)
	}
}
