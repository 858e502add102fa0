package app

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
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
	if strings.Count(err.Error(), tinyDigest(t)) != 2 || !strings.Contains(err.Error(), "scoring.shadows") {
		t.Errorf("error names neither digests nor the way out: %v", err)
	}
	var ended error
	if life.End(&ended); ended != nil {
		t.Error(ended)
	}
}

// tinyDigest returns the digest of the tiny ensemble.
func tinyDigest(t *testing.T) string {
	t.Helper()
	e, err := ensemble.Open("../../scoring/testdata/tiny")
	if err != nil {
		t.Fatal(err)
	}
	return e.Digest
}

// A shadow has the name of a live ensemble and another digest, and is the only one of its name.
func TestShadowsAreChecked(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	life, _ := NewLifecycle(t.Context(), quiet)
	tiny := "../../scoring/testdata/tiny"
	other := func() string {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(tiny)); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "ensemble.json")
		content, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, append(content, '\n'), 0o600) // another digest
		}
		if err != nil {
			t.Fatal(err)
		}
		return dir
	}
	c := ScoringConfig{Options: scoring.Options{Threads: 1}, Ensembles: []string{tiny}}
	live, err := OpenEngines(c, prometheus.NewRegistry(), quiet, life)
	if err != nil {
		t.Fatal(err)
	}
	one := other()
	for want, shadows := range map[string][]string{
		"must be named as one of scoring.ensembles": {"../../scoring/testdata/tiny-2"},
		"that scores tiny already":                  {tiny},
		"are both named tiny, one is allowed":       {one, one},
	} {
		c.Shadows = shadows
		if _, err := openShadows(c, live, quiet, life); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("shadows %q: error is %v, want %q", shadows, err, want)
		}
	}
	c.Shadows = []string{one}
	shadows, err := openShadows(c, live, quiet, life)
	if err != nil || shadows["tiny"] == nil {
		t.Errorf("%v, %v", shadows, err)
	}
	var ended error
	if life.End(&ended); ended != nil {
		t.Error(ended)
	}
}
