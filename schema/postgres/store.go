package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

var (
	// ErrNotFound is returned if a row that was asked for by its key does not exist.
	ErrNotFound = errors.New("not found")
	// ErrClosed is returned by Record after Close.
	ErrClosed = errors.New("the store is closed")
	// ErrNotMigrated is returned by Open if the tables are older than this program.
	ErrNotMigrated = errors.New("the tables are older than this program, run: decuwatch migrate")
	// ErrNotFinite is returned by Record for a score or an alert that holds a NaN or an infinity. Nothing was written.
	ErrNotFinite = errors.New("not a finite number")
)

// Channels of NOTIFY, for Listen.
const (
	ChannelOutbox     = "decuwatch_outbox"     // deliveries were added to the outbox
	ChannelThresholds = "decuwatch_thresholds" // thresholds changed
	ChannelReviews    = "decuwatch_reviews"    // reviews were opened or changed
)

// Config is the configuration of a [Store]. Fields with a name are settings.
type Config struct {
	// Address of the database: postgres://user@host:5432/name. Parameters as in libpq: sslmode=verify-full,
	// sslrootcert=FILE, passfile=FILE.
	URL string `name:"url" default:"postgres://127.0.0.1:5432/decuwatch"`
	// Maximum number of connections.
	MaxConns int `name:"max-conns" default:"8" min:"1"`
	// Maximum concurrent transactions that write verdicts.
	Committers int `name:"committers" default:"2" min:"1"`
	// Maximum number of verdicts in one transaction.
	BatchSize int `name:"batch-size" default:"256" min:"1"`
	// Longest time of a transaction that writes verdicts.
	CommitTimeout time.Duration `name:"commit-timeout" default:"10s" min:"1ms"`
	// Longest time of any other statement.
	StatementTimeout time.Duration `name:"statement-timeout" default:"30s" min:"1ms"`
	// Longest wait for a lock.
	LockTimeout time.Duration `name:"lock-timeout" default:"5s" min:"1ms"`

	Sinks       []schema.Sink `kong:"-"` // to which each alert is owed. Defaults to [schema.SinkStream] alone
	Volume      Volume        `kong:"-"` // Defaults to no bound: every alert is sent
	Maintenance Maintenance   `kong:"-"` // how long data is kept
	Log         *slog.Logger  `kong:"-"` // Defaults to slog.Default()
}

// Check returns an error that names the settings out of their bounds.
func (c Config) Check() error {
	// pgx takes "" for the settings of libpq's own environment variables.
	if _, err := pgx.ParseConfig(c.URL); err != nil || c.URL == "" {
		return settings.Errorf("postgres.url is not an address: postgres://user@host:5432/name")
	}
	if c.MaxConns >= 1 && c.MaxConns <= c.Committers {
		return settings.Errorf("postgres.max-conns is %d, must be more than postgres.committers, %d", c.MaxConns,
			c.Committers)
	}
	return settings.Check("postgres", c)
}

// Store is the database. Its methods are safe for concurrent use.
type Store struct {
	config Config
	pool   *pgxpool.Pool
	log    *slog.Logger

	queue   chan *call
	closing chan struct{}
	close   sync.Once
	working sync.WaitGroup

	months sync.Map // begin of a month (time.Time) -> struct{}: partitions known to exist
}

// Open connects, checks that sessions are as this program needs them (else ErrSession), and that the tables are those
// that it knows or newer ones (else ErrNotMigrated, or ErrEdited).
func Open(ctx context.Context, c Config) (*Store, error) {
	url := c.URL // has no default here
	c, c.Maintenance = settings.WithDefaults(c), settings.WithDefaults(c.Maintenance)
	c.URL = url
	c.Log = cmp.Or(c.Log, slog.Default())
	if c.Sinks == nil {
		c.Sinks = []schema.Sink{schema.SinkStream}
	}
	if err := errors.Join(c.Check(), c.Volume.Check(), c.Maintenance.Check()); err != nil {
		return nil, err
	}
	pc, err := pgxpool.ParseConfig(c.URL)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	pc.MaxConns = int32(c.MaxConns)
	err = configure(pc.ConnConfig, map[string]string{
		"synchronous_commit":                  "on",
		"statement_timeout":                   milliseconds(c.StatementTimeout),
		"lock_timeout":                        milliseconds(c.LockTimeout),
		"idle_in_transaction_session_timeout": milliseconds(c.StatementTimeout),
	})
	if err == nil {
		err = checkPooler(ctx, pc.ConnConfig)
	}
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	pool, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	s := &Store{config: c, pool: pool, log: c.Log, queue: make(chan *call), closing: make(chan struct{})}
	if err := s.checkVersion(ctx); err != nil {
		pool.Close()
		return nil, err
	}
	for range c.Committers {
		s.working.Go(s.commitLoop)
	}
	return s, nil
}

func (s *Store) checkVersion(ctx context.Context) error {
	db := stdlib.OpenDBFromPool(s.pool)
	defer db.Close()
	current, newest, err := version(ctx, db)
	if err != nil {
		return err
	}
	if current < newest {
		return fmt.Errorf("postgres: version %d of the tables, version %d is needed: %w", current, newest, ErrNotMigrated)
	}
	p, err := provider(db)
	if err != nil {
		return err
	}
	if err := checkHashes(ctx, db, p); err != nil {
		return fmt.Errorf("postgres: %w", err)
	}
	return nil
}

// Close waits for the transactions of Record that are under way and closes the connections. Calls of Record that
// are not in a transaction yet return ErrClosed.
func (s *Store) Close() {
	s.close.Do(func() { close(s.closing) })
	s.working.Wait()
	s.pool.Close()
}

// Ping returns nil if the database answers.
func (s *Store) Ping(ctx context.Context) error {
	if err := s.pool.Ping(ctx); err != nil {
		return fmt.Errorf("ping postgres: %w", err)
	}
	return nil
}

// Listen calls notify after each notification on the channel, and after each time that it began to listen (again),
// for changes before that were not announced to it. It keeps reconnecting, and returns ctx.Err() when ctx ends.
func (s *Store) Listen(ctx context.Context, channel string, notify func()) error {
	retry := backoff.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for {
		began := time.Now()
		err := s.listen(ctx, channel, notify)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(began) > retry.Max {
			retry.Failures = 0
		}
		wait := retry.Next()
		s.log.Warn("listening to postgres was interrupted", "channel", channel, "retry", wait, "err", err)
		backoff.Sleep(ctx, wait)
	}
}

// listen holds a connection of its own, outside the pool, for as long as it lasts.
func (s *Store) listen(ctx context.Context, channel string, notify func()) error {
	const checked = 30 * time.Second // a connection that died without a word is noticed after it
	conn, err := pgx.ConnectConfig(ctx, s.pool.Config().ConnConfig)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "LISTEN "+pgx.Identifier{channel}.Sanitize()); err != nil {
		return err
	}
	notify()
	for {
		wait, cancel := context.WithTimeout(ctx, checked)
		_, err := conn.WaitForNotification(wait)
		cancel()
		switch {
		case err == nil:
			notify()
		case ctx.Err() != nil:
			return ctx.Err()
		case pgconn.Timeout(err):
			ask, cancel := context.WithTimeout(ctx, checked)
			err := conn.Ping(ask)
			cancel()
			if err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// begin runs f in a transaction.
func (s *Store) begin(ctx context.Context, name string, f func(tx pgx.Tx) error) error {
	if err := pgx.BeginFunc(ctx, s.pool, f); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%d", d.Milliseconds()) }
