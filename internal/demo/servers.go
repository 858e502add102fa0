package demo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// lock creates the directory and takes it for this process.
func (d *demo) lock() (unlock func(), err error) {
	if d.Dir, err = filepath.Abs(d.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(d.Dir, 0o755); err != nil { //nolint:gosec // Postgres' user must pass through
		return nil, err
	}
	path := filepath.Join(d.Dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644) //nolint:gosec // empty
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil { //nolint:gosec // small
		_ = f.Close()
		return nil, fmt.Errorf("another demo runs in %s: end it, or choose another --dir", d.Dir)
	}
	return func() { _ = f.Close() }, nil
}

// startServers starts NATS and Postgres, sets the first thresholds, and configures the monitor for them.
func (d *demo) startServers(ctx context.Context) (err error) {
	e, err := ensemble.Open(d.Ensemble)
	if err != nil {
		return err
	}
	d.ensemble = e
	d.say("ensemble", "%s, %d components, %d classes, %s", e.Name, e.Components, len(e.Classes), e.Digest[:12])

	if d.broker, err = startNATS(filepath.Join(d.Dir, "nats"), d.NATSPort); err != nil {
		return err
	}
	d.life.OnStop("nats-server", func() error { d.broker.Shutdown(); d.broker.WaitForShutdown(); return nil })
	d.say("NATS", "%s, JetStream on disk", d.broker.ClientURL())

	if d.database, err = local.Start(ctx, local.Options{Dir: filepath.Join(d.Dir, "postgres")}); err != nil {
		return err
	}
	d.life.OnStop("postgres", d.database.Stop)
	if err := postgres.Migrate(ctx, d.database.URL()); err != nil {
		return err
	}
	d.say("Postgres", "%s, migrated", d.database.Address())

	d.cfg.NATS.URL, d.cfg.Postgres.URL = d.broker.ClientURL(), d.database.URL()
	d.cfg.Metrics.Address, d.cfg.Review.Address = loopback(freePort(d.MetricsPort)), loopback(freePort(d.ReviewPort))
	d.cfg.Volume = postgres.Volume{} // every alert of a demo is sent, however often it runs
	d.cfg.Scoring.Ensembles, d.cfg.Scoring.Library = []string{d.Ensemble}, d.Library
	if d.store, err = d.cfg.Postgres.Open(ctx, d.log); err != nil {
		return err
	}
	d.life.OnStop("store", func() error { d.store.Close(); return nil })
	notes, err := referenceThresholds(ctx, d.store, e)
	for _, note := range notes {
		d.say("thresholds", "%s", note)
	}
	return err
}

// startNATS starts a server within this process that keeps its streams in dir and flushes each write to disk.
func startNATS(dir string, port int) (*server.Server, error) {
	if port = freePort(port); port == 0 {
		port = server.RANDOM_PORT
	}
	s, err := server.NewServer(&server.Options{
		ServerName: "decuwatch-demo", Host: "127.0.0.1", Port: port,
		JetStream: true, StoreDir: dir, SyncAlways: true, NoLog: true, NoSigs: true,
	})
	if err != nil {
		return nil, fmt.Errorf("start nats-server: %w", err)
	}
	s.Start()
	if !s.ReadyForConnections(30 * time.Second) {
		s.Shutdown()
		return nil, errors.New("start nats-server: not ready after 30s")
	}
	return s, nil
}

// loopback returns the address of a port that only this machine reaches.
func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// freePort returns the port if it is free, else 0, which means any.
func freePort(port int) int {
	l, err := net.Listen("tcp", loopback(port))
	if err != nil {
		return 0
	}
	_ = l.Close()
	return port
}
