// Package postgres holds the tables of decuwatch, as numbered migrations, and every query on them.
package postgres

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"embed"
	"encoding/hex"
	"errors"
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

var (
	// ErrNewer is returned by Migrate for tables that are newer than this program. Nothing was changed. A Store opens on
	// them.
	ErrNewer = errors.New("the tables are newer than this program, nothing was changed")
	// ErrEdited is returned by Migrate and Open if the tables were made by a migration whose file is another in this
	// program.
	ErrEdited = errors.New("a migration was edited after it was applied")
)

// Migrate brings the database at url to the newest version of the tables. Several processes may call it at the same
// moment: one migrates, the others wait for it. The database's user must own the schema decuwatch or be allowed to
// create it, and be allowed to create roles if decuwatch_writer and decuwatch_reader do not exist yet. Tables that
// are newer than this program are left alone: the error is ErrNewer. So are tables that were made by a migration whose
// file has other contents here: the error is ErrEdited.
func Migrate(ctx context.Context, url string) error {
	return migrate(ctx, url, func(db *sql.DB, p *goose.Provider) error {
		if _, err := p.Up(ctx); err != nil {
			return err
		}
		return storeHashes(ctx, db, p)
	})
}

// MigrateDown takes all migrations back, with everything that is stored. The roles stay. Errors are those of Migrate.
func MigrateDown(ctx context.Context, url string) error {
	return migrate(ctx, url, func(_ *sql.DB, p *goose.Provider) error {
		_, err := p.DownTo(ctx, 0)
		return err
	})
}

// Version returns the version of the tables at url and the newest that this program knows. The first is 0 if the
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
	if err := db.QueryRowContext(ctx, `SELECT pg_catalog.to_regclass($1) IS NOT NULL`,
		versionTable).Scan(&there); err != nil {
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
	err = db.QueryRowContext(ctx, `SELECT coalesce(max(version_id), 0) FROM decuwatch.migrations
		WHERE is_applied`).Scan(&current)
	if err != nil {
		return 0, 0, fmt.Errorf("read version of tables: %w", err)
	}
	return current, newest, nil
}

func migrate(ctx context.Context, url string, run func(*sql.DB, *goose.Provider) error) (err error) {
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
	defer func() { // the end of the session unlocks, too
		_, _ = conn.ExecContext(context.WithoutCancel(ctx), `SELECT pg_catalog.pg_advisory_unlock($1)`, int64(migrationLock))
	}()
	if _, err := conn.ExecContext(ctx, `CREATE SCHEMA IF NOT EXISTS decuwatch`); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	p, err := provider(db)
	if err != nil {
		return err
	}
	current, newest, err := version(ctx, db)
	if err != nil {
		return err
	}
	if current > newest {
		return fmt.Errorf("migrate: the tables are at version %d, this program knows %d: %w", current, newest, ErrNewer)
	}
	if err := checkHashes(ctx, db, p); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	if err := run(db, p); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

// hashes returns the SHA-256 of each migration's file in this program, by its version.
func hashes(p *goose.Provider) (map[int64]string, error) {
	all := map[int64]string{}
	for _, source := range p.ListSources() {
		content, err := migrations.ReadFile("migrations/" + source.Path)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(content)
		all[source.Version] = hex.EncodeToString(sum[:])
	}
	return all, nil
}

// checkHashes holds the stored hashes of applied migrations against this program's files. A database that has no such
// table yet passes.
func checkHashes(ctx context.Context, db *sql.DB, p *goose.Provider) error {
	var there bool
	if err := db.QueryRowContext(ctx,
		`SELECT pg_catalog.to_regclass('decuwatch.migration_hashes') IS NOT NULL`).Scan(&there); err != nil || !there {
		return err
	}
	own, err := hashes(p)
	if err != nil {
		return err
	}
	rows, err := db.QueryContext(ctx,
		`SELECT version_id, file, sha256 FROM decuwatch.migration_hashes ORDER BY version_id`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var version int64
		var file, hash string
		if err := rows.Scan(&version, &file, &hash); err != nil {
			return err
		}
		if ours, known := own[version]; known && ours != hash {
			return fmt.Errorf("%w: %s had SHA-256 %.12s… when it was applied, and has %.12s… in this program",
				ErrEdited, file, hash, ours)
		}
	}
	return rows.Err()
}

// storeHashes stores the missing hashes of applied migrations.
func storeHashes(ctx context.Context, db *sql.DB, p *goose.Provider) error {
	own, err := hashes(p)
	if err != nil {
		return err
	}
	for _, source := range p.ListSources() {
		_, err := db.ExecContext(ctx, `INSERT INTO decuwatch.migration_hashes (version_id, file, sha256)
			SELECT $1::bigint, $2, $3 WHERE EXISTS (SELECT FROM decuwatch.migrations WHERE version_id = $1 AND is_applied)
			ON CONFLICT DO NOTHING`,
			source.Version, source.Path, own[source.Version])
		if err != nil {
			return fmt.Errorf("store hash of %s: %w", source.Path, err)
		}
	}
	return nil
}

func provider(db *sql.DB) (*goose.Provider, error) {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	p, err := goose.NewProvider(database.DialectPostgres, db, files, goose.WithTableName(versionTable),
		goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	return p, nil
}
