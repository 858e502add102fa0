package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// ReviewConfig says what enters review beside alerts, how evidence is made, and who may see the review page.
type ReviewConfig struct {
	Share          float64  `name:"share" default:"0.01" help:"Share of scores without an alert that enter review unmarked, so that recall can be estimated; 0 to 1. Defaults to 0.01."`
	Address        string   `name:"address" default:"127.0.0.1:8080" help:"Address of the review page; port 0 is any free one, none is no page. One that other machines reach takes review.token-file or review.trusted-header. Defaults to 127.0.0.1:8080."`
	TokenFile      string   `name:"token-file" placeholder:"FILE" help:"File with the token that reviewers log in with, 16 characters or more. Defaults to none."`
	TrustedHeader  string   `name:"trusted-header" placeholder:"NAME" help:"Header in which the proxy before the page names the user that it has authenticated. Defaults to none."`
	TrustedProxies []string `name:"trusted-proxies" placeholder:"CIDR" help:"Addresses of proxies whose review.trusted-header is believed. Defaults to loopback."`
	HTTPTLSConfig
	URL              string `name:"url" placeholder:"URL" help:"Where reviewers reach the page from outside: https://review.example.com. Defaults to none."`
	Workers          int    `name:"workers" default:"1" help:"Requests that are rerun for their evidence at a time, behind live work; 0 leaves evidence to other processes. Defaults to 1."`
	EvidenceAttempts int    `name:"evidence-attempts" default:"4" help:"Attempts to make one request's evidence, at most. Defaults to 4."`
	ImageSide        int    `name:"image-side" default:"512" help:"Longer side of a stored image in pixels, 16 to 512; larger ones are scaled down. Defaults to 512."`
}

// headerName is a token of RFC 9110.
var headerName = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")

// noPage is the address that turns the review page off.
const noPage = "none"

func (c ReviewConfig) validate() error {
	if c.Address != noPage {
		if err := hostPort("review.address", c.Address); err != nil {
			return fmt.Errorf("%w, or %s", err, noPage)
		}
	}
	if c.TokenFile != "" && c.TrustedHeader != "" {
		return usage("review.token-file and review.trusted-header must not both be given")
	}
	if len(c.TrustedProxies) > 0 && c.TrustedHeader == "" {
		return usage("review.trusted-proxies is given without review.trusted-header")
	}
	if c.TrustedHeader != "" && !headerName.MatchString(c.TrustedHeader) {
		return usage("review.trusted-header is %q, must be the name of a header", c.TrustedHeader)
	}
	if _, err := c.proxies(); err != nil {
		return err
	}
	return errors.Join(
		c.pair("review"), webAddress("review.url", c.URL), share("review.share", c.Share),
		between("review.image-side", int64(c.ImageSide), 16, 512), between("review.workers", int64(c.Workers), 0, 64),
		atLeast("review", map[string]int64{"evidence-attempts": int64(c.EvidenceAttempts)}, 1),
	)
}

func (c ReviewConfig) proxies() ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, s := range c.TrustedProxies {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			ip, err := netip.ParseAddr(s)
			if err != nil {
				return nil, usage("review.trusted-proxies: %q is not an address or a CIDR", s)
			}
			p = netip.PrefixFrom(ip, ip.BitLen())
		}
		list = append(list, p)
	}
	return list, nil
}

// access reads who may see the page.
func (c ReviewConfig) access() (review.Access, error) {
	a := review.Access{Header: c.TrustedHeader, URL: c.URL, TLS: c.TLSCert != "", Reviewer: userName()}
	var err error
	if a.Proxies, err = c.proxies(); err != nil {
		return a, err
	}
	if c.TokenFile != "" {
		token, err := os.ReadFile(c.TokenFile)
		if err != nil {
			return a, fmt.Errorf("review.token-file: %w", err)
		}
		if a.Token = strings.TrimSpace(string(token)); a.Token == "" {
			return a, usage("review.token-file: %s is empty", c.TokenFile)
		}
	}
	return a, nil
}

// reviewLink begins the links to reviews on the page at url; "" where there is no page.
func reviewLink(url string) string {
	if url == "" {
		return ""
	}
	return strings.TrimSuffix(url, "/") + "/review/"
}

// userName returns the name of the user who runs this.
func userName() string {
	if u, err := user.Current(); err == nil && u.Username != "" {
		return u.Username
	}
	return "local"
}

// serveReview runs the evidence worker and the page, and returns the page's address, or "" where there is none.
func serveReview(c ReviewConfig, store *postgres.Store, engines map[string]*scoring.Engine, reg prometheus.Registerer, log *slog.Logger, life *lifecycle) (string, error) {
	if c.Workers > 0 {
		gatherers := make([]review.Gatherer, 0, len(engines))
		for _, e := range engines {
			gatherers = append(gatherers, e)
		}
		worker, err := review.NewWorker(store, gatherers, review.WorkerConfig{
			Workers: c.Workers, MaxAttempts: c.EvidenceAttempts, ImageSide: c.ImageSide, Registerer: reg, Log: log,
		})
		if err != nil {
			return "", err
		}
		life.run("evidence", worker.Run)
	}
	if c.Address == noPage {
		return "", nil
	}
	access, err := c.access()
	if err != nil {
		return "", err
	}
	listener, err := c.listen("review", c.Address)
	if err != nil {
		return "", err
	}
	page, err := review.NewPage(store, listener.Addr(), review.PageConfig{Access: access, Registerer: reg, Log: log})
	if err != nil {
		return "", errors.Join(err, listener.Close())
	}
	life.run("review page", func(ctx context.Context) error { return serveHTTP(ctx, listener, page) })
	return listener.Addr().String(), nil
}

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

// withStore runs f on the store.
func withStore(ctx context.Context, c PostgresConfig, log *slog.Logger, f func(*postgres.Store) error) error {
	store, err := postgres.Open(ctx, c.config(log))
	if err != nil {
		return err
	}
	defer store.Close()
	return f(store)
}

type reviewListCmd struct {
	State    string         `default:"todo" enum:"todo,open,acknowledged,resolved,all" help:"todo (open and acknowledged), open, acknowledged, resolved or all."`
	Model    string         `placeholder:"NAME" help:"Reviews of this model only."`
	Class    *int           `placeholder:"INDEX" help:"Reviews of this class only."`
	Assignee string         `placeholder:"NAME" help:"Reviews assigned to this person only."`
	Severity string         `enum:"warn,critical," default:"" placeholder:"warn|critical" help:"Reviews of alerts of this severity only; requests drawn at random are left out then."`
	Limit    int            `default:"50" help:"The newest so many."`
	JSON     bool           `name:"json" help:"Print JSON."`
	Postgres PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
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
		filter.States = []string{schema.ReviewOpen, schema.ReviewAcknowledged}
	case "all":
	default:
		filter.States = []string{c.State}
	}
	return withStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
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
	return r.State
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

type reviewShowCmd struct {
	ID       string         `arg:"" help:"Id of the review, which is its alert's."`
	Images   string         `placeholder:"DIR" help:"Write the images, the map and the numbers of the evidence into this directory."`
	JSON     bool           `name:"json" help:"Print JSON."`
	Postgres PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
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
	return withStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
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
	ID       string         `arg:"" help:"Id of the review, which is its alert's."`
	By       string         `placeholder:"NAME" help:"Who does it. Defaults to the user who runs this."`
	Version  int            `placeholder:"N" help:"Version of the review that this was decided on; a newer one is a conflict. Defaults to the newest."`
	Postgres PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

// change changes the review and prints what it is then.
func (f reviewFlags) change(ctx context.Context, s *streams, log *slog.Logger, c review.Change) error {
	c.Actor, c.Version = f.By, f.Version
	if c.Actor == "" {
		c.Actor = userName()
	}
	if f.Version < 0 {
		return usage("--version is %d, must be 1 or more", f.Version)
	}
	return withStore(ctx, f.Postgres, log, func(store *postgres.Store) error {
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
	return c.change(ctx, s, log, review.Change{Action: review.Resolve, Verdict: strings.ReplaceAll(c.Verdict, "-", "_"), Comment: c.Comment})
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
	Model    string         `placeholder:"NAME" help:"This model only."`
	Class    *int           `placeholder:"INDEX" help:"This class only."`
	Days     int            `default:"30" help:"Events of the last so many days."`
	JSON     bool           `name:"json" help:"Print JSON."`
	Postgres PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
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
	return withStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
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
