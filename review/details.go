package review

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Details is a review with everything that is stored about its request.
type Details struct {
	postgres.Review
	Score   *schema.Score          `json:"score,omitempty"` // nil if retention dropped it
	Alert   *schema.Alert          `json:"alert,omitempty"` // most severe; nil for a request that was drawn at random
	Alerts  []schema.Alert         `json:"alerts"`          // all of the request, the most severe first
	History []postgres.ReviewEntry `json:"history"`
	Files   []string               `json:"files"` // of the evidence

	files   []postgres.EvidenceFile
	classes map[int]postgres.ClassData // of its own class, and of those that the judge finds likely
}

// Load reads the review with the given id, or with the only id that starts with it. The error wraps
// postgres.ErrNotFound if there is no such review.
func Load(ctx context.Context, store *postgres.Store, id string) (Details, error) {
	r, err := store.ReviewByID(ctx, id)
	if err != nil {
		return Details{}, err
	}
	return details(ctx, store, r)
}

// details reads what belongs to a review.
func details(ctx context.Context, store *postgres.Store, r postgres.Review) (d Details, err error) {
	d.Review = r
	if d.History, err = store.ReviewHistory(ctx, d.ID); err != nil {
		return d, err
	}
	if d.Score, err = store.ScoreByID(ctx, d.Identity()); err != nil && !errors.Is(err, postgres.ErrNotFound) {
		return d, err
	}
	if d.Alerts, err = store.AlertsOf(ctx, d.Identity()); err != nil {
		return d, err
	}
	if len(d.Alerts) > 0 {
		d.Alert = &d.Alerts[0]
	}
	if d.files, err = store.EvidenceFiles(ctx, d.ID); err != nil {
		return d, err
	}
	if d.classes, err = store.ClassData(ctx, d.Model, d.EnsembleDigest, concerned(r, d.Score)); err != nil {
		return d, err
	}
	d.Files = []string{}
	for _, f := range d.files {
		d.Files = append(d.Files, f.Name)
	}
	return d, nil
}

// WriteEvidence writes the files of the evidence into a directory, which it creates. It fails if there is no evidence.
func (d Details) WriteEvidence(ctx context.Context, store *postgres.Store, dir string) error {
	if len(d.files) == 0 {
		return fmt.Errorf("review %.12s has no evidence (%s%s)", d.ID, dash(string(d.Evidence)), because(d.EvidenceError))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // the user's own directory
		return err
	}
	for _, f := range d.files {
		file, err := store.EvidenceFile(ctx, d.ID, f.Name)
		if err != nil {
			return err
		}
		name := f.Name + ".png"
		if f.ContentType == "application/json" {
			name = f.Name + ".json"
		}
		path := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(path, file.Body, 0o644); err != nil { //nolint:gosec // as above
			return err
		}
	}
	return nil
}

// Print prints the details for a terminal.
func (d Details) Print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	line := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	line("review", "%s", d.ID)
	line("state", "%s, version %d", StateOf(d.Review), d.Version)
	line("assignee", "%s", dash(d.Assignee))
	line("class", "%s (%d) of %s", terminal.Printable(d.ClassLabel), d.ClassIndex, terminal.Printable(d.Model))
	line("event", "%s of %s, %s", terminal.Printable(d.EventID), terminal.Printable(d.Source),
		terminal.Time(d.EventTime))
	for _, a := range d.Alerts {
		line("alert", "%s: %s, %s %.4g >= %.4g", a.Severity, Words(a.Reason), a.Measurement, a.Decided, a.Threshold)
	}
	if s := d.Score; s != nil {
		for _, m := range s.Measurements() {
			line(Words(m.Name), "%.4g (%s)", m.Value, m.Estimator)
		}
		for _, c := range d.verdict() {
			line("judge", "%.3f %s", c.Probability, terminal.Printable(c.Label))
		}
		for _, missing := range d.Unmeasured() {
			line(Words(missing.Name), "%s", missing.Why)
		}
		r := s.Receipt
		line("receipt", "seed %d, %s, component %d carried, %s", r.Seed, r.Settings, r.Carrier, r.EnsembleDigest)
	} else {
		line("score", "past its retention")
	}
	if data := d.TrainingData(); data != "" {
		line("training data", "%s", data)
	}
	switch d.Evidence {
	case postgres.EvidenceDone:
		line("evidence", "%d files: %s", len(d.Files), strings.Join(d.Files, " "))
	case postgres.EvidenceFailed, postgres.EvidencePending:
		line("evidence", "%s after %d attempts%s", d.Evidence, d.EvidenceAttempts, because(d.EvidenceError))
	}
	for _, h := range d.History {
		what := h.Action
		switch h.Action {
		case Resolve:
			what += " as " + Words(h.Verdict)
		case Assign:
			what += " to " + dash(h.Assignee)
		}
		comment := strings.ReplaceAll(h.Comment, "\n", " ")
		line(terminal.Time(h.At), "%s %s%s", terminal.Printable(h.Actor), what, because(comment))
	}
	return w.Flush()
}

// PrintList prints one line for each review for a terminal.
func PrintList(out io.Writer, list []postgres.Review) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "id\tstate\tmodel\tclass\tevent\tassignee\tevidence\topened")
	for _, r := range list {
		fmt.Fprintf(w, "%.12s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.ID, StateOf(r), terminal.Printable(r.Model),
			terminal.Printable(r.ClassLabel), terminal.Printable(r.EventID), dash(r.Assignee), dash(string(r.Evidence)),
			terminal.Time(r.OpenedAt))
	}
	return w.Flush()
}

// Print prints the estimates for a terminal.
func (s Stats) Print(out io.Writer) error {
	t := s.Tally
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	line := func(name string, e Estimate, format string, args ...any) {
		value := "unknown"
		if e.Known {
			value = fmt.Sprintf("%.1f%%", 100*e.Value)
		}
		fmt.Fprintf(w, "%s\t%s\t%.1f%% to %.1f%%\t%s\n", name, value, 100*e.Low, 100*e.High, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(w, "\testimate\t%g%% interval\tfrom\n", 100*s.Confidence)
	line("precision", s.Precision, "%d confirmed and %d expected of %d alerts with a verdict, %d without",
		t.AlertsConfirmed, t.AlertsExpected, t.AlertsConfirmed+t.AlertsExpected+t.AlertsFalse, t.AlertsOpen)
	line("missed", s.MissRate, "%d of %d requests drawn at random that have a verdict, of %d drawn",
		t.SamplesTrue, t.SamplesTrue+t.SamplesFalse, t.Sampled)
	line("recall", s.Recall, "%.0f requests with an alert, %.0f without", t.RequestsAlerted,
		max(0, t.Requests-t.RequestsAlerted))
	return w.Flush()
}

// StateOf returns the verdict of a resolved review in words, else its state.
func StateOf(r postgres.Review) string {
	if r.Verdict != "" {
		return Words(r.Verdict)
	}
	return string(r.State)
}

func dash(s string) string { return cmp.Or(terminal.Printable(s), "-") }

func because(s string) string {
	if s == "" {
		return ""
	}
	return ": " + terminal.Printable(s)
}
