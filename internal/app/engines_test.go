package app

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/scoring"
)

func TestEnsemblesOfOneNameAreRefused(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	life, _ := NewLifecycle(t.Context(), quiet)
	tiny := "../../scoring/testdata/tiny"
	c := ScoringConfig{Options: scoring.Options{Threads: 1}, Ensembles: []string{tiny, tiny + "/ensemble.json"}}
	_, err := OpenEngines(c, prometheus.NewRegistry(), quiet, life)
	if err == nil || !strings.Contains(err.Error(), "both named tiny") {
		t.Errorf("error is %v", err)
	}
	var ended error
	if life.End(&ended); ended != nil {
		t.Error(ended)
	}
}
