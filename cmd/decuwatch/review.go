package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type reviewCmd struct {
	List    reviewListCmd    `cmd:"" help:"List the reviews that wait for a reviewer."`
	Show    reviewShowCmd    `cmd:"" help:"Show one review with its history."`
	Ack     reviewAckCmd     `cmd:"" help:"Acknowledge a review: you look at it."`
	Resolve reviewResolveCmd `cmd:"" help:"Resolve a review with a verdict."`
	Reopen  reviewReopenCmd  `cmd:"" help:"Take a verdict back."`
	Assign  reviewAssignCmd  `cmd:"" help:"Assign a review to somebody, or to nobody."`
	Comment reviewCommentCmd `cmd:"" help:"Write a comment."`
	Stats   reviewStatsCmd   `cmd:"" help:"Estimate precision and recall of the alerts from the verdicts."`
}

func (reviewCmd) Help() string {
	return `Every alert on a score is reviewed, and so is a random share of the requests without an alert (review.share).
The list does not say which is which, so that the verdict comes from the images. An id may be shortened to its first
characters, 6 or more.`
}

// reviewFlags are the flags of every verb that changes a review.
type reviewFlags struct {
	ID       reviewID           `arg:"" help:"Id of the review; an alert and its review have the same id."`
	By       string             `placeholder:"NAME" help:"Name of the reviewer. Defaults to the current user."`
	Version  int                `placeholder:"N" help:"Fail if the review is not at version N. Defaults to any."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

// reviewID is the id of a review, or its beginning.
type reviewID string

// Validate is called by kong once the arguments are read.
func (id reviewID) Validate() error {
	if len(id) < 6 {
		return fmt.Errorf("%q is too short, must be 6 characters or more", string(id))
	}
	return nil
}

// change changes the review and prints its new state.
func (f reviewFlags) change(ctx context.Context, s *streams, log *slog.Logger, c review.Change) error {
	if f.Version < 0 {
		return usage("--version is %d, must be 1 or more", f.Version)
	}
	actor, err := person(f.By)
	if err != nil {
		return err
	}
	c.Actor, c.Version = actor, f.Version
	return app.WithStore(ctx, f.Postgres, log, func(store *postgres.Store) error {
		r, err := c.Apply(ctx, store, string(f.ID))
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(s.out, "review %.12s is %s, assigned to %s, version %d\n",
			r.ID, review.StateOf(r), cmp.Or(printable(r.Assignee), "-"), r.Version)
		return err
	})
}

type reviewAckCmd struct {
	reviewFlags `embed:""`
	Comment     string `placeholder:"TEXT" help:"Comment for the history."`
}

func (reviewAckCmd) Help() string {
	return `Fails and changes nothing if somebody else has acknowledged it before.

Example:

  decuwatch review ack 3f2a9c --by alice`
}

func (c *reviewAckCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return c.change(ctx, s, log, review.Change{Action: review.Acknowledge, Comment: c.Comment})
}

type reviewResolveCmd struct {
	reviewFlags `embed:""`
	Verdict     string `arg:"" help:"confirmed, false_alarm or expected."`
	Comment     string `placeholder:"TEXT" help:"Comment for the history."`
}

func (reviewResolveCmd) Help() string {
	return `confirmed: the model does not understand the request. false_alarm: nothing is wrong. expected: the model does
not understand the request, which is known and accepted. The verdict is published on uncertainty.review.<model>.

Examples:

  decuwatch review resolve 3f2a9c confirmed --comment "boots without heels"
  decuwatch review resolve 3f2a9c false_alarm`
}

func (c *reviewResolveCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	verdict := schema.ReviewVerdict(strings.ReplaceAll(c.Verdict, "-", "_"))
	if verdicts := schema.ReviewVerdicts(); !slices.Contains(verdicts, verdict) {
		return usage("the verdict is %q, must be one of %s", c.Verdict, schema.List(verdicts))
	}
	return c.change(ctx, s, log, review.Change{Action: review.Resolve, Verdict: verdict, Comment: c.Comment})
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
	Name        string `arg:"" optional:"" help:"Assignee. Defaults to nobody."`
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
