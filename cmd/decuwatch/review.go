package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type reviewCmd struct {
	List    reviewListCmd    `cmd:"" help:"List what waits for a reviewer."`
	Show    reviewShowCmd    `cmd:"" help:"Show one review with its history."`
	Ack     reviewAckCmd     `cmd:"" help:"Acknowledge: somebody looks at it."`
	Resolve reviewResolveCmd `cmd:"" help:"Resolve with a verdict."`
	Reopen  reviewReopenCmd  `cmd:"" help:"Take a verdict back."`
	Assign  reviewAssignCmd  `cmd:"" help:"Assign to somebody, or to nobody."`
	Comment reviewCommentCmd `cmd:"" help:"Write a comment."`
	Stats   reviewStatsCmd   `cmd:"" help:"Estimate precision and recall of the alerts from the verdicts."`
}

func (reviewCmd) Help() string {
	return `Every alert on a score is reviewed, and so is a random share of the requests without one (review.share). The list does not say which is which: a verdict shall come from the images. An id may be shortened to its first characters, 6 or more.`
}

type reviewListCmd struct {
	State    string             `default:"todo" enum:"todo,open,acknowledged,resolved,all" help:"todo (open and acknowledged), open, acknowledged, resolved or all."`
	Model    string             `placeholder:"NAME" help:"Reviews of this model only."`
	Class    *int               `placeholder:"INDEX" help:"Reviews of this class only."`
	Assignee string             `placeholder:"NAME" help:"Reviews assigned to this person only."`
	Severity schema.Severity    `enum:"warn,critical," default:"" placeholder:"warn|critical" help:"Reviews of alerts of this severity only; requests drawn at random are left out then."`
	Limit    int                `default:"50" help:"The newest so many."`
	JSON     bool               `name:"json" help:"Print JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (reviewListCmd) Help() string {
	return `Examples:

  decuwatch review list
  decuwatch review list --severity critical --model fashion-mnist
  decuwatch review list --state resolved --json | jq -r '[.[] | .verdict] | group_by(.) | map({(.[0]): length}) | add'`
}

func (c *reviewListCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Limit < 1 || c.Limit > 10_000 {
		return usage("--limit is %d, must be 1 to 10000", c.Limit)
	}
	filter := postgres.ReviewFilter{Model: c.Model, Class: c.Class, Assignee: c.Assignee, Severity: c.Severity, Limit: c.Limit}
	switch c.State {
	case "todo":
		filter.States = []schema.ReviewState{schema.ReviewOpen, schema.ReviewAcknowledged}
	case "all":
	default:
		filter.States = []schema.ReviewState{schema.ReviewState(c.State)}
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		list, err := store.Reviews(ctx, filter)
		if err != nil {
			return err
		}
		for i := range list {
			list[i] = review.Unmarked(list[i])
		}
		if c.JSON {
			if list == nil {
				list = []postgres.Review{}
			}
			return writeJSON(s.out, list)
		}
		if len(list) == 0 {
			fmt.Fprintln(s.out, "Nothing waits for a reviewer here.")
			return nil
		}
		w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
		fmt.Fprintln(w, "id\tstate\tmodel\tclass\tevent\tassignee\tevidence\topened")
		for _, r := range list {
			fmt.Fprintf(w, "%.12s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.ID, stateOf(r), printable(r.Model), printable(r.ClassLabel), printable(r.EventID),
				dash(printable(r.Assignee)), dash(r.Evidence), r.OpenedAt.Local().Format(time.DateTime))
		}
		return w.Flush()
	})
}

// stateOf returns the verdict of a resolved review, else its state.
func stateOf(r postgres.Review) string {
	if r.Verdict != "" {
		return review.Words(r.Verdict)
	}
	return string(r.State)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

type reviewShowCmd struct {
	ID       string             `arg:"" help:"Id of the review, which is its alert's."`
	Images   string             `placeholder:"DIR" help:"Write the images, the map and the numbers of the evidence into this directory."`
	JSON     bool               `name:"json" help:"Print JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (reviewShowCmd) Help() string {
	return `Examples:

  decuwatch review show 3f2a9c
  decuwatch review show 3f2a9c --images /tmp/evidence`
}

// shownReview is what show prints as JSON.
type shownReview struct {
	postgres.Review
	Score   *schema.Score          `json:"score,omitempty"`
	Alert   *schema.Alert          `json:"alert,omitempty"`
	History []postgres.ReviewEntry `json:"history"`
	Files   []string               `json:"files"`
}

func (c *reviewShowCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		r, err := store.ReviewByID(ctx, c.ID)
		if err != nil {
			return err
		}
		shown := shownReview{Review: r, Files: []string{}}
		if shown.History, err = store.ReviewHistory(ctx, r.ID); err != nil {
			return err
		}
		if shown.Score, err = store.ScoreByID(ctx, r.Identity()); err != nil && !errors.Is(err, postgres.ErrNotFound) {
			return err
		}
		if r.AlertID != "" {
			alert, err := store.AlertByID(ctx, r.AlertID)
			if err != nil {
				return err
			}
			shown.Alert = &alert
		}
		files, err := store.EvidenceFiles(ctx, r.ID)
		if err != nil {
			return err
		}
		for _, f := range files {
			shown.Files = append(shown.Files, f.Name)
		}
		if c.Images != "" {
			if len(files) == 0 {
				return fmt.Errorf("review %.12s has no evidence (%s%s)", r.ID, dash(r.Evidence), reason(r.EvidenceError))
			}
			if err := c.write(ctx, store, r.ID, files); err != nil {
				return err
			}
		}
		if c.JSON {
			return writeJSON(s.out, shown)
		}
		return shown.print(s.out)
	})
}

func reason(s string) string {
	if s == "" {
		return ""
	}
	return ": " + printable(s)
}

// write writes the files of the evidence.
func (c *reviewShowCmd) write(ctx context.Context, store *postgres.Store, id string, files []postgres.EvidenceFile) error {
	if err := os.MkdirAll(c.Images, 0o755); err != nil { //nolint:gosec // the user's own directory
		return err
	}
	for _, f := range files {
		file, err := store.EvidenceFile(ctx, id, f.Name)
		if err != nil {
			return err
		}
		name := f.Name + ".png"
		if f.ContentType == "application/json" {
			name = f.Name + ".json"
		}
		if err := os.WriteFile(filepath.Join(c.Images, filepath.Base(name)), file.Body, 0o644); err != nil { //nolint:gosec // as above
			return err
		}
	}
	return nil
}

func (v shownReview) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	line := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	line("review", "%s", v.ID)
	line("state", "%s, version %d", stateOf(v.Review), v.Version)
	line("assignee", "%s", dash(printable(v.Assignee)))
	line("class", "%s (%d) of %s", printable(v.ClassLabel), v.ClassIndex, printable(v.Model))
	line("event", "%s of %s, %s", printable(v.EventID), printable(v.Source), v.EventTime.Local().Format(time.DateTime))
	if v.Alert != nil {
		line("alert", "%s: %s, %s %.4g >= %.4g", v.Alert.Severity, review.Words(v.Alert.Reason), v.Alert.Measurement, v.Alert.Decided, v.Alert.Threshold)
	}
	if s := v.Score; s != nil {
		line("class gap", "%.4g (%s)", s.ClassGap.Value, s.ClassGap.Estimator)
		line("request risk", "%.4g (%s)", s.RequestRisk.Value, s.RequestRisk.Estimator)
		line("receipt", "seed %d, %s, component %d carried, %s", s.Receipt.Seed, s.Receipt.Settings, s.Receipt.Carrier, s.Receipt.EnsembleDigest)
	} else {
		line("score", "past its retention")
	}
	switch v.Evidence {
	case postgres.EvidenceDone:
		line("evidence", "%d files: %s", len(v.Files), strings.Join(v.Files, " "))
	case postgres.EvidenceFailed, postgres.EvidencePending:
		line("evidence", "%s after %d attempts%s", v.Evidence, v.EvidenceAttempts, reason(v.EvidenceError))
	}
	for _, h := range v.History {
		what := h.Action
		switch h.Action {
		case review.Resolve:
			what += " as " + review.Words(h.Verdict)
		case review.Assign:
			what += " to " + dash(printable(h.Assignee))
		}
		text := ""
		if h.Comment != "" {
			text = ": " + printable(strings.ReplaceAll(h.Comment, "\n", " "))
		}
		line(h.At.Local().Format(time.DateTime), "%s %s%s", printable(h.Actor), what, text)
	}
	return w.Flush()
}

// reviewFlags are the flags of every verb that changes a review.
type reviewFlags struct {
	ID       string             `arg:"" help:"Id of the review, which is its alert's."`
	By       string             `placeholder:"NAME" help:"Who does it. Defaults to the user who runs this."`
	Version  int                `placeholder:"N" help:"Version of the review that this was decided on; a newer one is a conflict. Defaults to the newest."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

// change changes the review and prints what it is then.
func (f reviewFlags) change(ctx context.Context, s *streams, log *slog.Logger, c review.Change) error {
	c.Actor, c.Version = f.By, f.Version
	if c.Actor == "" {
		c.Actor = app.UserName()
	}
	if f.Version < 0 {
		return usage("--version is %d, must be 1 or more", f.Version)
	}
	return app.WithStore(ctx, f.Postgres, log, func(store *postgres.Store) error {
		r, err := review.NewDesk(store).Change(ctx, f.ID, c)
		if err != nil {
			return err
		}
		fmt.Fprintf(s.out, "review %.12s is %s, assigned to %s, version %d\n", r.ID, stateOf(r), dash(printable(r.Assignee)), r.Version)
		return nil
	})
}

type reviewAckCmd struct {
	reviewFlags `embed:""`
	Comment     string `placeholder:"TEXT" help:"Comment for the history."`
}

func (reviewAckCmd) Help() string {
	return `Fails, and changes nothing, where somebody else acknowledged it before.

Example:

  decuwatch review ack 3f2a9c --by alice`
}

func (c *reviewAckCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return c.change(ctx, s, log, review.Change{Action: review.Acknowledge, Comment: c.Comment})
}

type reviewResolveCmd struct {
	reviewFlags `embed:""`
	Verdict     string `arg:"" help:"confirmed (the model does not understand the request), false_alarm (nothing is wrong) or expected (it does not, which is known and accepted)."`
	Comment     string `placeholder:"TEXT" help:"Comment for the history."`
}

func (reviewResolveCmd) Help() string {
	return `The verdict is published on uncertainty.review.<model>.

Examples:

  decuwatch review resolve 3f2a9c confirmed --comment "boots without heels"
  decuwatch review resolve 3f2a9c false_alarm`
}

func (c *reviewResolveCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return c.change(ctx, s, log, review.Change{Action: review.Resolve, Verdict: schema.ReviewVerdict(strings.ReplaceAll(c.Verdict, "-", "_")), Comment: c.Comment})
}

type reviewReopenCmd struct {
	reviewFlags `embed:""`
	Comment     string `placeholder:"TEXT" help:"Comment for the history."`
}

func (c *reviewReopenCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return c.change(ctx, s, log, review.Change{Action: review.Reopen, Comment: c.Comment})
}

type reviewAssignCmd struct {
	reviewFlags `embed:""`
	Name        string `arg:"" optional:"" help:"To whom. Without a name: to nobody."`
}

func (c *reviewAssignCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return c.change(ctx, s, log, review.Change{Action: review.Assign, Assignee: c.Name})
}

type reviewCommentCmd struct {
	reviewFlags `embed:""`
	Text        string `arg:"" help:"The comment, at most 4000 characters."`
}

func (c *reviewCommentCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return c.change(ctx, s, log, review.Change{Action: review.Comment, Comment: c.Text})
}

type reviewStatsCmd struct {
	Model    string             `placeholder:"NAME" help:"This model only."`
	Class    *int               `placeholder:"INDEX" help:"This class only."`
	Days     int                `default:"30" help:"Events of the last so many days."`
	JSON     bool               `name:"json" help:"Print JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (reviewStatsCmd) Help() string {
	return `Precision is the share of reviewed alerts that were confirmed or expected (interval after Wilson). Recall is estimated from the requests without an alert that were drawn at random: each stands for all of its share (interval from those of precision and of the share missed, after Clopper and Pearson, at half the error each). Canaries are left out.

Example:

  decuwatch review stats --model fashion-mnist --days 7`
}

func (c *reviewStatsCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Days < 1 || c.Days > 3650 {
		return usage("--days is %d, must be 1 to 3650", c.Days)
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		now := time.Now()
		stats, err := review.LoadStats(ctx, store, c.Model, c.Class, now.AddDate(0, 0, -c.Days), now)
		if err != nil {
			return err
		}
		if c.JSON {
			return json.NewEncoder(s.out).Encode(stats)
		}
		t := stats.Tally
		w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
		line := func(name string, e review.Estimate, of string) {
			value := "unknown"
			if e.Known {
				value = fmt.Sprintf("%.1f%%", 100*e.Value)
			}
			fmt.Fprintf(w, "%s\t%s\t%.1f%% to %.1f%%\t%s\n", name, value, 100*e.Low, 100*e.High, of)
		}
		fmt.Fprintf(w, "\testimate\t%g%% interval\tfrom\n", 100*stats.Confidence)
		right := t.AlertsConfirmed + t.AlertsExpected
		line("precision", stats.Precision, fmt.Sprintf("%d confirmed and %d expected of %d alerts with a verdict, %d without", t.AlertsConfirmed, t.AlertsExpected, right+t.AlertsFalse, t.AlertsOpen))
		line("missed", stats.MissRate, fmt.Sprintf("%d of %d requests drawn at random that have a verdict, of %d drawn", t.SamplesTrue, t.SamplesTrue+t.SamplesFalse, t.Sampled))
		line("recall", stats.Recall, fmt.Sprintf("%d requests with an alert, %d without", t.Alerted, max(0, t.Scored-t.Alerted)))
		return w.Flush()
	})
}
