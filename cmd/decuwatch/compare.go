package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/compare"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type compareCmd struct {
	Old      string             `arg:"" help:"Ensemble: a directory, a manifest, or the beginning of a digest."`
	New      string             `arg:"" help:"Ensemble to compare with it, named alike."`
	Since    *moment            `placeholder:"TIME" help:"Oldest event: RFC 3339, a date, or how long ago. Default: 720h."`
	Until    *moment            `placeholder:"TIME" help:"Events before this time. Defaults to now."`
	JSON     bool               `name:"json" help:"Print lines of JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (compareCmd) Help() string {
	return `Compares the scores of two ensembles on the events that both scored: how alike they rank requests, which ` +
		`alerts would appear and disappear in each class at the thresholds in force, and the 20 requests whose ranks ` +
		`differ most. An ensemble scores the events of another as its shadow (scoring.shadows), or by decuwatch rescore.

Examples:

  decuwatch compare ensembles/fashion-mnist ensembles/next
  decuwatch compare 47700176e23f 0c1b2a49 --json | jq 'select(.kind == "class")'`
}

func (c *compareCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	now := time.Now().UTC()
	since, until := c.Since.or(now.Add(-30*24*time.Hour)), c.Until.or(now)
	if !since.Before(until) {
		return usage("--since is %s, must be before --until, %s", since.Format(time.RFC3339), until.Format(time.RFC3339))
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		one, other, err := c.series(ctx, store)
		if err != nil {
			return err
		}
		result, err := compareSeries(ctx, store, one, other, since, until)
		if err != nil {
			return err
		}
		if c.JSON {
			return writeLines(s.out, result.Lines())
		}
		return result.Print(s.out)
	})
}

// series returns the two series.
func (c *compareCmd) series(ctx context.Context, store *postgres.Store) (one, other schema.Series, err error) {
	if one, err = namedSeries(ctx, store, c.Old); err != nil {
		return one, other, err
	}
	other, err = namedSeries(ctx, store, c.New)
	switch {
	case err != nil:
	case one.Model != other.Model:
		err = usage("%s scores %s and %s scores %s: the two must have one name", c.Old, one.Model, c.New, other.Model)
	case one == other:
		err = usage("%s and %s are the same ensemble with the same settings", c.Old, c.New)
	}
	return one, other, err
}

// compareSeries compares the scores of two series on the same events.
func compareSeries(ctx context.Context, store *postgres.Store, one, other schema.Series, since, until time.Time,
) (*compare.Result, error) {
	table, err := alerts.ReadTable(ctx, store)
	if err != nil {
		return nil, err
	}
	c := compare.New(one, other, table)
	err = store.ScoredBy(ctx, one, other, since, until, func(one, other *schema.Score) error {
		c.Add(one, other)
		return nil
	})
	if err != nil {
		return nil, err
	}
	result := c.Result()
	if result.Events == 0 {
		return nil, fmt.Errorf("%w from %s to %s: serve one as the shadow of the other (scoring.shadows), or run "+
			"decuwatch rescore", errNothingInCommon, since.Format(time.RFC3339), until.Format(time.RFC3339))
	}
	return result, nil
}

// errNothingInCommon is returned if two ensembles have scored no event in common.
var errNothingInCommon = errors.New("no event has a score of both ensembles")

var digestStart = regexp.MustCompile(`^[0-9a-f]{6,64}$`)

// namedSeries returns the series that an argument names: by the path of an ensemble, or by the beginning of its digest.
func namedSeries(ctx context.Context, store *postgres.Store, text string) (schema.Series, error) {
	_, err := os.Stat(text)
	if err == nil || !digestStart.MatchString(text) {
		e, err := ensemble.Open(text)
		if err != nil {
			return schema.Series{}, err
		}
		return app.SeriesOf(e), nil
	}
	found, err := store.SeriesOf(ctx, text)
	switch {
	case err != nil:
		return schema.Series{}, err
	case len(found) == 0:
		return schema.Series{}, usage("no score and no threshold belongs to an ensemble whose digest begins with %s", text)
	case len(found) == 1:
		return found[0], nil
	}
	var names []string
	for _, f := range found {
		names = append(names, fmt.Sprintf("%s %s (%s)", f.Model, f.EnsembleDigest, f.Settings))
	}
	return schema.Series{}, usage("%s is ambiguous, give the ensemble's path: %s", text, strings.Join(names, ", "))
}
