package main

import (
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// asDemo stores as many scores of each class of the shipped ensemble as a demo does.
func asDemo(t *testing.T, url string) {
	t.Helper()
	store, err := postgres.Open(t.Context(), postgres.Config{URL: url, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	e, err := ensemble.Open(shipped)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Now().UTC().Truncate(time.Microsecond).Add(-time.Hour)
	measured := func(name schema.MeasurementName, class, i int) schema.Measurement {
		value := e.Reference[string(name)].Mean * (0.5 + float64(i*37%100)/100)
		if !slices.Contains(e.WellSampled(), class) {
			value *= float64(class + 2)
		}
		return schema.Measurement{Estimator: "paide-w2", Value: value, UpperBound: 1, MeanDistance: value,
			Distances: [][]float64{{0, value}, {value, 0}}, Shares: []float64{0.5, 0.5}}
	}
	for i := range 200 {
		class := i % len(e.Classes)
		risk := measured(schema.RequestRisk, class, i)
		s := schema.Score{
			Event: schema.Event{Source: "/demo", ID: strconv.Itoa(i), Time: at,
				Data: schema.Generation{Model: e.Name, Class: schema.ClassIndex(class)}},
			ClassIndex: class, ClassLabel: e.Classes[class].Label, ClassGap: measured(schema.ClassGap, class, i),
			RequestRisk: &risk, RequestRiskProbability: 1, ImageRiskReason: schema.NoJudge, ScoredAt: at,
			Receipt: schema.Receipt{EnsembleDigest: e.Digest, Settings: e.Profile.Settings(), Profile: "fixed",
				Noise: "torch-cpu", Runtime: "onnxruntime", Device: "cpu"},
		}
		if _, err := store.Record(t.Context(), schema.Verdict{Score: &s, Delivery: schema.Delivery{
			Stream: "GENERATION", Sequence: uint64(i + 1), Delivered: 1, Digest: schema.Digest(nil, []byte(s.Event.ID)),
		}}); err != nil {
			t.Fatal(err)
		}
	}
}

// The commands of docs/thresholds.md work on the data of a demo, in their order.
func TestThresholdsPage(t *testing.T) {
	url := pgtest.URL(t)
	asDemo(t, url)
	user := command{t, []string{"DECUWATCH_POSTGRES_URL=" + url}}
	content, err := os.ReadFile("../../docs/thresholds.md")
	if err != nil {
		t.Fatal(err)
	}
	joined := strings.ReplaceAll(string(content), "\\\n", " ")
	commands := regexp.MustCompile(`(?m)^    decuwatch (thresholds .*)$`).FindAllStringSubmatch(joined, -1)
	if len(commands) < 4 {
		t.Fatalf("%d commands", len(commands))
	}
	for _, c := range commands {
		line := strings.ReplaceAll(c[1], "ensembles/", "../../ensembles/")
		var args []string
		for _, word := range regexp.MustCompile(`"[^"]*"|\S+`).FindAllString(line, -1) {
			args = append(args, strings.Trim(word, `"`))
		}
		if strings.Contains(line, "--apply") {
			args = append(args, "--by=tester")
		}
		user.run(exitOK, args...)
	}
}
