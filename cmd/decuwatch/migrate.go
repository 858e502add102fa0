package main

import (
	"context"
	"fmt"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type migrateCmd struct {
	Up     migrateUpCmd     `cmd:"" default:"withargs" help:"Create or upgrade the tables (the default)."`
	Down   migrateDownCmd   `cmd:"" help:"Remove the tables with everything in them."`
	Status migrateStatusCmd `cmd:"" help:"Print the version of the tables."`
}

func (migrateCmd) Help() string {
	return `Two processes may migrate at the same time: one does the work, and the other waits for it.

Examples:

  decuwatch migrate --postgres.url postgres://owner@db/decuwatch
  decuwatch migrate status
  decuwatch migrate down --yes`
}

type migrateUpCmd struct {
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url"`
}

func (c *migrateUpCmd) Run(ctx context.Context, s *streams) error {
	before, newest, err := postgres.Version(ctx, c.Postgres.URL)
	if err != nil {
		return err
	}
	if err := postgres.Migrate(ctx, c.Postgres.URL); err != nil {
		return err
	}
	if before == newest {
		fmt.Fprintf(s.out, "the tables are at version %d already\n", newest)
		return nil
	}
	fmt.Fprintf(s.out, "the tables went from version %d to %d\n", before, newest)
	return nil
}

type migrateDownCmd struct {
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url"`
	Yes      bool               `help:"Confirm that every score, alert and threshold is removed."`
}

func (c *migrateDownCmd) Run(ctx context.Context, s *streams) error {
	if !c.Yes {
		return usage("migrate down removes every score, alert and threshold; confirm with --yes")
	}
	if err := postgres.MigrateDown(ctx, c.Postgres.URL); err != nil {
		return err
	}
	fmt.Fprintln(s.out, "the tables are removed")
	return nil
}

type migrateStatusCmd struct {
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url"`
}

func (c *migrateStatusCmd) Run(ctx context.Context, s *streams) error {
	current, newest, err := postgres.Version(ctx, c.Postgres.URL)
	if err != nil {
		return err
	}
	switch {
	case current == 0:
		fmt.Fprintf(s.out, "there are no tables; this program makes version %d: decuwatch migrate\n", newest)
	case current < newest:
		fmt.Fprintf(s.out, "the tables are at version %d, this program needs %d: decuwatch migrate\n", current, newest)
	case current > newest:
		fmt.Fprintf(s.out, "the tables are at version %d, newer than this program, which knows %d\n", current, newest)
	default:
		fmt.Fprintf(s.out, "the tables are at version %d, as this program needs\n", current)
		return nil
	}
	return errDifference
}
