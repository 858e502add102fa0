// Package postgres holds the tables of decuwatch, as numbered migrations, and every query on them.
package postgres

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
)

//go:embed migrations/*.sql
var migrations embed.FS

const (
	versionTable = "decuwatch.migrations"
	// migrationLock is the key of the advisory lock under which migrations run: a number of this program's own.
	migrationLock = 0x6465637577617463
)

// Migrate brings the database at url to the newest version of the tables. Several processes may call it at the same
// moment: one migrates, the others wait for it. The database's user must own the schema decuwatch or be allowed to create it, and
// be allowed to create roles where decuwatch_writer and decuwatch_reader do not exist yet.
func Migrate(ctx context.Context, url string) error {
	return migrate(ctx, url, func(p *goose.Provider) error {
		_, err := p.Up(ctx)
		return err
	})
}

// MigrateDown takes all migrations back, with everything that is stored. The roles stay.
func MigrateDown(ctx context.Context, url string) error {
	return migrate(ctx, url, func(p *goose.Provider) error {
		_, err := p.DownTo(ctx, 0)
		return err
	})
}

// Version returns the version of the tables at url and the newest that this program knows. The first is 0 where the
// database was never migrated.
func Version(ctx context.Context, url string) (current, newest int64, err error) {
	db, err := sql.Open("pgx", url)
	if err != nil {
		return 0, 0, fmt.Errorf("read version of tables: %w", err)
	}
	defer db.Close()
	return version(ctx, db)
}

func version(ctx context.Context, db *sql.DB) (current, newest int64, err error) {
	var there bool
	if err := db.QueryRowContext(ctx, `SELECT pg_catalog.to_regclass($1) IS NOT NULL`, versionTable).Scan(&there); err != nil {
		return 0, 0, fmt.Errorf("read version of tables: %w", err)
	}
	p, err := provider(db)
	if err != nil {
		return 0, 0, err
	}
	for _, source := range p.ListSources() {
		newest = max(newest, source.Version)
	}
	if !there {
		return 0, newest, nil
	}
	err = db.QueryRowContext(ctx, `SELECT coalesce(max(version_id), 0) FROM decuwatch.migrations WHERE is_applied`).Scan(&current)
	if err != nil {
		return 0, 0, fmt.Errorf("read version of tables: %w", err)
	}
	return current, newest, nil
}

func migrate(ctx context.Context, url string, run func(*goose.Provider) error) (err error) {
	cc, err := pgx.ParseConfig(url)
	if err == nil {
		err = configure(cc, nil)
	}
	if err == nil {
		err = checkPooler(ctx, cc)
	}
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	db := stdlib.OpenDB(*cc)
	defer db.Close()
	conn, err := db.Conn(ctx)
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	defer conn.Close()
	// The lock belongs to this session and ends with it, should the process die. It covers the schema's creation
	// too, which is why goose's own locker does not do.
	if _, err := conn.ExecContext(ctx, `SELECT pg_catalog.pg_advisory_lock($1)`, int64(migrationLock)); err != nil {
		return fmt.Errorf("migrate: wait for the lock: %w", err)
	}
	defer conn.ExecContext(context.WithoutCancel(ctx), `SELECT pg_catalog.pg_advisory_unlock($1)`, int64(migrationLock))
	if _, err := conn.ExecContext(ctx, `CREATE SCHEMA IF NOT EXISTS decuwatch`); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	p, err := provider(db)
	if err != nil {
		return err
	}
	if err := run(p); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

func provider(db *sql.DB) (*goose.Provider, error) {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	p, err := goose.NewProvider(database.DialectPostgres, db, files, goose.WithTableName(versionTable), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	return p, nil
}
