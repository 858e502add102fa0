package postgres_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Every query is prepared on the migrated tables, and belongs to the program.
func TestQueriesArePrepared(t *testing.T) {
	_, conn := open(t, postgres.Config{})
	code, err := os.ReadFile("queries.go")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("queries/*")
	if err != nil || len(files) == 0 {
		t.Fatal("no queries", err)
	}
	for _, file := range files {
		sql, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Prepare(testContext(t), file, string(sql)); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		if !strings.Contains(string(code), "//go:embed "+file+"\n") {
			t.Errorf("%s is not part of the program", file)
		}
	}
}

// Statistics leave out what the table of canaries knows, not what an event says about itself.
func TestCanariesAreLeftOutOfStatistics(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	canary, pretender, plain := score("canary", 1, 1), score("pretender", 2, 2), score("plain", 3, 3)
	unmarked := score("unmarked", 4, 4)
	for _, x := range []*schema.Score{canary, pretender} {
		x.Event.Data.Labels = map[string]string{schema.LabelCanary: "true"}
	}
	for _, x := range []*schema.Score{canary, unmarked} {
		if err := s.AddCanary(testContext(t), postgres.Canary{
			Source: x.Event.Source, EventID: x.Event.ID, Model: x.Event.Data.Model, DueAt: time.Now(),
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []*schema.Score{canary, unmarked, pretender, plain} {
		mustRecord(t, s, schema.Verdict{Score: x, Delivery: schema.Delivery{Stream: "GENERATION",
			Digest: strings.Repeat("0", 64)}})
	}
	of := plain.Series()
	from, to := plain.Event.Time.Add(-time.Hour), plain.Event.Time.Add(time.Hour)
	samples, err := s.Samples(testContext(t), of, schema.ClassGap, from, to)
	if err != nil || len(samples) != 2 {
		t.Errorf("%d samples, want 2: %v", len(samples), err)
	}
	values, err := s.ScoreValues(testContext(t), of, schema.RequestRisk, nil, from, 10)
	if err != nil || len(values) != 2 {
		t.Errorf("%d values, want 2: %v", len(values), err)
	}
	_, n, err := s.Tail(testContext(t), of, schema.ClassGap, []int{plain.ClassIndex}, from, 0.5)
	if err != nil || n != 2 {
		t.Errorf("a tail of %d scores, want 2: %v", n, err)
	}
	tally, err := s.TallyReviews(testContext(t), "", nil, from.Truncate(time.Hour), to.Truncate(time.Hour).Add(time.Hour))
	if err != nil || tally.Scored != 2 {
		t.Errorf("%d scored events, want 2: %v", tally.Scored, err)
	}
	if got := count(t, conn, `SELECT sum(n) FROM decuwatch_views.class_risk_hourly`); got != 2 {
		t.Errorf("%d events in the hourly sums, want 2", got)
	}
	if got := count(t, conn, `SELECT count(*) FROM decuwatch_views.production_scores`); got != 2 {
		t.Errorf("%d scores in the analysts' view, want 2", got)
	}
}
