package faults

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"
)

func postgresScenarios() []scenario {
	return []scenario{
		{
			name: "postgres-killed", quick: true, kill: true,
			does: "SIGKILL of all of Postgres under load one to three times, down for up to 2 s each",
			setup: func(t *testing.T) *servers {
				return &servers{nats: plain(t).nats, database: startDatabase(t, "", durable())}
			},
			run: func(r *run) {
				r.worker()
				stop := r.load()
				for range 1 + r.rng.IntN(3) {
					if !r.working(10) {
						return
					}
					r.sleep(0, 500*time.Millisecond)
					r.database.server.Kill()
					down := r.between(0, 2*time.Second)
					time.Sleep(down) // the length of the fault
					r.database.start()
					r.broke("SIGKILL of Postgres, back after %s", down.Round(time.Millisecond))
				}
				stop()
				r.settle()
				r.objects()
			},
		},
		{
			name: "postgres-cut", quick: true, kill: true, setup: plain,
			does: "the network between worker and Postgres swallows one direction for up to 3 s, then is cut, two to five " +
				"times: answers to commits are lost",
			run: func(r *run) {
				r.worker()
				stop := r.load()
				for range 2 + r.rng.IntN(4) {
					if !r.working(10) {
						return
					}
					fromWorker, d := r.rng.IntN(2) == 0, r.between(10*time.Millisecond, 3*time.Second)
					r.postgresProxy.silence(fromWorker, d)
					r.broke("Postgres hears nothing of the worker (%t) or it nothing of Postgres for %s, then cut", fromWorker,
						d.Round(time.Millisecond))
				}
				stop()
				r.settle()
			},
		},
		{
			name: "postgres-slow", setup: plain,
			does: "every message between worker and Postgres takes up to 400 ms: transactions outlast the commit timeout",
			run: func(r *run) {
				r.worker()
				stop := r.load()
				if !r.working(10) {
					return
				}
				d := r.between(50*time.Millisecond, 400*time.Millisecond)
				r.postgresProxy.setDelay(d)
				r.broke("%s before each message to and from Postgres", d.Round(time.Millisecond))
				r.sleep(4*time.Second, 8*time.Second)
				r.postgresProxy.setDelay(0)
				r.mend()
				stop()
				r.settle()
			},
		},
		{
			name: "postgres-locked", quick: true, setup: plain,
			does: "a table is locked for up to 6 s, longer than a commit may take: no dead letter, nothing acknowledged " +
				"without a commit",
			run: func(r *run) {
				w := r.worker()
				stop := r.load()
				if !r.working(10) {
					return
				}
				table := []string{"events", "scores", "alerts", "outbox"}[r.rng.IntN(4)]
				r.holding("BEGIN; LOCK TABLE decuwatch."+table+" IN ACCESS EXCLUSIVE MODE", func() {
					r.broke("decuwatch.%s is locked", table)
					r.sleep(3*time.Second, 6*time.Second)
				})
				r.mend()
				stop()
				r.settle()
				if !w.running() {
					r.violate("the worker has ended: %s", w.tail(500))
				}
			},
		},
		{
			name: "postgres-read-only", quick: true, setup: plain,
			does: "Postgres takes no writes, as after a failover to a replica: not ready within 30 s, nothing " +
				"acknowledged without a commit",
			run: func(r *run) {
				w := r.worker()
				stop := r.load()
				if !r.working(10) {
					return
				}
				r.database.admin("ALTER SYSTEM SET default_transaction_read_only = on")
				r.database.admin("SELECT pg_catalog.pg_reload_conf()")
				r.broke("Postgres is read-only")
				r.notReady(w)
				r.database.admin("ALTER SYSTEM RESET default_transaction_read_only")
				r.database.admin("SELECT pg_catalog.pg_reload_conf()")
				r.mend()
				stop()
				r.settle()
				r.readyAgain(w)
			},
		},
		{
			name: "postgres-full",
			does: "Postgres' file system is full (a tmpfs of 200 MB; needs root): not ready within 30 s; after room is " +
				"made, everything drains",
			setup: func(t *testing.T) *servers {
				return &servers{nats: plain(t).nats, database: startDatabase(t, tmpfs(t, "200m"), durable())}
			},
			run: func(r *run) {
				w := r.worker()
				stop := r.load()
				if !r.working(10) {
					return
				}
				ballast := fill(r.t, r.database.options.Dir)
				r.broke("Postgres' file system is full")
				r.notReady(w)
				if err := os.Remove(ballast); err != nil {
					r.t.Fatal(err)
				}
				// A server that could not write its log has stopped. Its supervisor restarts it.
				if r.database.try("SELECT 1") != nil {
					r.database.server.Kill()
					r.database.start()
				}
				r.mend()
				stop()
				r.settle()
				r.readyAgain(w)
			},
		},
		{
			name: "postgres-restored", setup: plain,
			does: "Postgres is restored from a copy that is some verdicts old, by the steps of docs/operating.md: I " +
				"after them",
			run: func(r *run) {
				w := r.worker()
				r.producer.publish(30)
				if !r.drained(deadline) {
					return
				}
				w.kill()
				name := databaseName(r.t, r.postgresURL)
				r.pool.Close()
				r.database.clone(name+"_backup", name)
				r.t.Cleanup(func() { r.database.drop(name + "_backup") })
				r.connect(r.postgresURL)
				w = r.worker()
				r.producer.publish(30)
				if !r.drained(deadline) {
					return
				}
				w.kill()
				r.pool.Close()
				r.watch.forget()
				r.database.drop(name)
				r.database.clone(name, name+"_backup")
				r.connect(r.postgresURL)
				r.broke("Postgres was restored from a copy from before the last 30 messages")
				if code, said := r.reconcile(); code != 3 {
					r.violate("30 messages have no verdict in the copy, and reconcile has exit code %d: %s", code, said)
				}
				r.afterRestore()
				r.worker()
				r.settle()
			},
		},
	}
}

// holding runs f while the run has a transaction open.
func (r *run) holding(sql string, f func()) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	conn, err := pgx.Connect(ctx, r.postgresURL)
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
	f()
}

// notReady expects a worker to become not ready within a time.
func (r *run) notReady(w *process) {
	r.t.Helper()
	r.within(30*time.Second, "the worker is not ready", func() bool { ready, _ := w.ready(); return !ready })
}

// readyAgain expects a running worker to become ready.
func (r *run) readyAgain(w *process) {
	r.t.Helper()
	if !w.running() {
		r.violate("the worker has ended: %s", w.tail(500))
		return
	}
	r.within(30*time.Second, "the worker is ready again", func() bool { ready, _ := w.ready(); return ready })
}

// tmpfs mounts a small file system and returns its directory.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755,size="+size); err != nil {
		t.Fatalf("mount a small file system: %v (run as root)", err)
	}
	unmount := sync.OnceValue(func() error { return unix.Unmount(dir, unix.MNT_DETACH) })
	interruption(unmount)
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill fills a file system, and returns the file that does.
func fill(t testing.TB, dir string) string {
	t.Helper()
	file, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	block := make([]byte, 1<<20)
	for size := len(block); size > 0; {
		_, err := file.Write(block[:size])
		switch {
		case errors.Is(err, unix.ENOSPC):
			size /= 2
		case err != nil:
			t.Fatal(err)
		}
	}
	return file.Name()
}

// databaseName returns the name of the database in an address.
func databaseName(t testing.TB, address string) string {
	t.Helper()
	c, err := pgx.ParseConfig(address)
	if err != nil {
		t.Fatal(err)
	}
	return c.Database
}

// afterRestore follows docs/operating.md after Postgres was restored: the consumers are created again, from the first
// message on.
func (r *run) afterRestore() {
	r.t.Helper()
	r.eventually("delete the consumers", func(ctx context.Context) error {
		s, err := r.js.Stream(ctx, eventStream)
		if err != nil {
			return err
		}
		names := s.ConsumerNames(ctx)
		for name := range names.Name() {
			if err := s.DeleteConsumer(ctx, name); err != nil {
				return err
			}
		}
		return names.Err()
	})
}
