package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/ort/ortfault"
)

// admin runs statements on the database, in a connection of their own.
func (b *bench) admin(statements ...string) {
	b.t.Helper()
	conn, err := pgx.Connect(b.t.Context(), b.db)
	if err != nil {
		b.t.Fatal(err)
	}
	defer conn.Close(b.t.Context())
	for _, s := range statements {
		if _, err := conn.Exec(b.t.Context(), s); err != nil {
			b.t.Fatalf("%s: %v", s, err)
		}
	}
}

// Readiness exercises what the next verdict needs: it names what does not work, and recovers once that works again.
func TestReadyMeansReady(t *testing.T) {
	server := natstest.Start(t)
	b := newBench(t, server.URL(), pgtest.URL(t))
	shim := ortfault.New(t)
	w := b.worker(shim.Env()...)
	mux := metricsAddress(t, w)
	isReady(t, mux)
	ctx := t.Context()

	// Postgres, in every connection from now on.
	reconnect := `SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid()`
	var name string
	if err := b.pool.QueryRow(ctx, `SELECT current_database()`).Scan(&name); err != nil {
		t.Fatal(err)
	}
	b.admin(`ALTER DATABASE `+name+` SET default_transaction_read_only = on`, reconnect)
	notReady(t, mux, "postgres: ", "read-only")
	b.admin(`SET default_transaction_read_only = off`,
		`ALTER DATABASE `+name+` RESET default_transaction_read_only`, reconnect)
	isReady(t, mux)
	b.admin(`ALTER SCHEMA decuwatch RENAME TO gone`)
	notReady(t, mux, "postgres: ", `"decuwatch.workers" does not exist`)
	b.admin(`ALTER SCHEMA gone RENAME TO decuwatch`)
	isReady(t, mux)
	b.admin(`ALTER TABLE decuwatch.scores RENAME TO gone`)
	notReady(t, mux, "postgres: ", "no such table, or no right to insert: scores")
	b.admin(`ALTER TABLE decuwatch.gone RENAME TO scores`)
	isReady(t, mux)

	// JetStream.
	durable := consumers.Durable(faultModel)
	if _, err := b.js.PauseConsumer(ctx, "GENERATION", durable, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	notReady(t, mux, "pulling: ", "consumer decuwatch-tiny is paused by an operator for 59m")
	if _, err := b.js.ResumeConsumer(ctx, "GENERATION", durable); err != nil {
		t.Fatal(err)
	}
	isReady(t, mux)
	stream, err := b.js.Stream(ctx, "UNCERTAINTY")
	if err != nil {
		t.Fatal(err)
	}
	was := stream.CachedInfo().Config
	full := was
	full.Discard, full.MaxBytes = jetstream.DiscardNew, 1024
	if _, err := b.js.UpdateStream(ctx, full); err != nil {
		t.Fatal(err)
	}
	notReady(t, mux, "nats: stream UNCERTAINTY is full: ")
	if _, err := b.js.UpdateStream(ctx, was); err != nil {
		t.Fatal(err)
	}
	isReady(t, mux)

	// ONNX Runtime.
	shim.Set(ortfault.Error)
	notReady(t, mux, "ensemble: tiny: the device is broken", "ortfault")
	shim.Set(ortfault.NaN)
	notReady(t, mux, "ensemble: tiny: the device is broken: the probe's output is not finite")
	shim.Set(ortfault.Hang)
	notReady(t, mux, "ensemble: tiny: the device is broken: a run of the backbone has not returned for ")
	shim.Set(ortfault.OK)
	isReady(t, mux)
	w.stop()
	for _, row := range b.query(`SELECT id FROM decuwatch.workers WHERE seen_at > '-infinity'`) {
		t.Errorf("the worker that ended counts as running: %s", row)
	}
}

// If neither the output for an event nor the output for the probe is finite, the event is kept, nothing is pulled,
// and the event is scored once the device works.
func TestBrokenDeviceMakesNoDeadLetters(t *testing.T) {
	server := natstest.Start(t)
	b := newBench(t, server.URL(), pgtest.URL(t))
	b.set("consumers.ack-wait", patient)
	b.set("consumers.max-deliver", "2")
	shim := ortfault.New(t)
	w := b.worker(shim.Env()...)
	mux := metricsAddress(t, w)
	isReady(t, mux)
	for _, mode := range []ortfault.Mode{ortfault.NaN, ortfault.Error} {
		shim.Set(mode)
		b.publish(20)
		notReady(t, mux, "ensemble: tiny: the device is broken", "pulling: ")
		shim.Set(ortfault.OK)
		isReady(t, mux)
	}
	b.drained()
	b.check()
	w.stop()

	// If the probe is finite, the event is at fault.
	w = b.worker(shim.Env()...)
	isReady(t, metricsAddress(t, w))
	shim.SetNext(ortfault.NaN, 1)
	bad := b.next.Load() + 1
	b.publish(1)
	natstest.Until(t, "the event is a dead letter", func() bool {
		return len(b.query(fmt.Sprintf(`SELECT event_id FROM decuwatch.dead_letters
			WHERE kind = 'non_finite' AND event_id = 'e%06d'`, bad))) == 1
	})
	w.stop()
}

// hangs waits until a run of the backbone hangs.
func hangs(t *testing.T, mux string) {
	t.Helper()
	natstest.Until(t, "a run hangs", func() bool {
		_, metrics := get(t, mux+"/metrics")
		return !strings.Contains(metrics, `decuwatch_sampler_run_age_seconds{model="tiny"} 0`+"\n")
	})
}

// A process exits although a run never returns: it gives its messages back and says what hangs.
func TestExitsWhileARunHangs(t *testing.T) {
	server := natstest.Start(t)
	b := newBench(t, server.URL(), pgtest.URL(t))
	b.set("consumers.drain-timeout", "1s")
	b.set("consumers.ack-wait", patient)
	shim := ortfault.New(t)
	w := b.worker(shim.Env()...)
	mux := metricsAddress(t, w)
	isReady(t, mux)
	shim.Set(ortfault.Hang)
	b.publish(10)
	hangs(t, mux)
	w.signal(syscall.SIGTERM)
	if state := w.wait(); state.ExitCode() != exitFailed {
		t.Errorf("it ended with %s", state)
	}
	holds(t, w.tail(), "a run does not return: backbone", `part="ensemble `+faultEnsemble+`"`)
	// Another worker gets its messages at once, not after ack-wait.
	shim.Set(ortfault.OK)
	w = b.worker(shim.Env()...)
	b.drained()
	b.check()
	w.stop()
}

// The process also exits if it hangs at the start, after one signal or two.
func TestExitsWhileTheStartHangs(t *testing.T) {
	server := natstest.Start(t)
	b := newBench(t, server.URL(), pgtest.URL(t))
	b.set("consumers.drain-timeout", "1s")
	shim := ortfault.New(t)
	shim.Set(ortfault.Hang)
	forced, second := b.worker(shim.Env()...), b.worker(shim.Env()...)
	for _, w := range []*worker{forced, second} {
		natstest.Until(t, "it loads ONNX Runtime", func() bool {
			maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", w.cmd.Process.Pid))
			return err == nil && strings.Contains(string(maps), "libortfault.so")
		})
		w.signal(syscall.SIGTERM)
	}
	natstest.Until(t, "the second signal ends it", func() bool {
		select {
		case <-second.ended:
			return true
		default:
			_ = second.cmd.Process.Signal(syscall.SIGTERM) // it may have ended meanwhile
			return false
		}
	})
	if status, ok := second.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() {
		t.Errorf("after two signals: %s", second.cmd.ProcessState)
	}
	hung := `hangs="start of ensemble ../../scoring/testdata/tiny"`
	if state := forced.wait(); state.ExitCode() != exitFailed || !strings.Contains(forced.tail(), hung) {
		t.Errorf("after one signal: %s\n%s", state, forced.tail())
	}
}

// If two workers score one model with two ensembles, the older worker reports both.
func TestTwoEnsemblesUnderOneName(t *testing.T) {
	server := natstest.Start(t)
	b := newBench(t, server.URL(), pgtest.URL(t))
	first := b.worker()
	mux := metricsAddress(t, first)
	isReady(t, mux)
	other := t.TempDir()
	if err := os.CopyFS(other, os.DirFS(faultEnsemble)); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(other, "ensemble.json")
	content, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	// The same ensemble with another digest.
	if err := os.WriteFile(manifest, append(content, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"serve", "-e", other, "--nats.url=" + b.natsURL, "--postgres.url=" + b.pgURL,
		"--metrics.address=127.0.0.1:0", "--review.address=none", "--review.workers=0",
		"--scoring.threads=1"}, b.flags...)
	second := start(t, nil, args...)
	digest, _ := tinyProfile(t)
	notReady(t, mux, "workers: model tiny is scored here with ensemble "+digest, "with ensemble ")
	natstest.Until(t, "the newer worker warns", func() bool {
		return strings.Contains(second.tail(), "two ensembles under one name")
	})
	second.stop()
	isReady(t, mux)
	first.stop()
}

// A worker that cannot update its consumer pulls nothing, and says so.
func TestNotReadyWithoutItsConsumer(t *testing.T) {
	server := natstest.Start(t)
	b := newBench(t, server.URL(), pgtest.URL(t))
	b.stream()
	_, err := b.js.CreateConsumer(t.Context(), "GENERATION", jetstream.ConsumerConfig{
		Durable: consumers.Durable(faultModel), AckPolicy: jetstream.AckNonePolicy,
		FilterSubject: "generation.requested.tiny",
	})
	if err != nil {
		t.Fatal(err)
	}
	w := b.worker()
	mux := metricsAddress(t, w)
	notReady(t, mux, "pulling: ", "consumer decuwatch-tiny")
	w.stop()
}

// TestNotReadyWithAWrongClockOfJetStream changes the time in every answer of a real server by years.
func TestNotReadyWithAWrongClockOfJetStream(t *testing.T) {
	server := natstest.Start(t)
	b := newBench(t, server.URL(), pgtest.URL(t))
	b.natsURL = "nats://" + shiftAnswers(t, server.Address())
	w := b.worker()
	mux := metricsAddress(t, w)
	notReady(t, mux, "clock: this worker's clock is ", "behind jetstream's, at most 30s is allowed")
	_, metrics := get(t, mux+"/metrics")
	holds(t, metrics, `decuwatch_clock_offset_seconds{against="jetstream"} -`)
	w.stop()
}

// shiftAnswers passes connections on to a NATS server and returns the address to connect to. It changes the year of
// the time in the server's answers, but not their length.
func shiftAnswers(t *testing.T, server string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	said := regexp.MustCompile(`"ts":"20\d\d-`)
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			upstream, err := net.Dial("tcp", server)
			if err != nil {
				client.Close()
				return
			}
			go func() { _, _ = io.Copy(upstream, client); upstream.Close() }() // ends with either side
			go func() {
				defer client.Close()
				for buf := make([]byte, 1<<20); ; {
					n, err := upstream.Read(buf)
					shifted := said.ReplaceAll(buf[:n], []byte(`"ts":"2071-`))
					if _, failed := client.Write(shifted); err != nil || failed != nil {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

// A worker whose clock differs from the database's is not ready, and says by how much.
func TestNotReadyWithAWrongClock(t *testing.T) {
	server := natstest.Start(t)
	url := pgtest.ShiftedURL(t, -time.Hour)
	b := newBench(t, server.URL(), url)
	w := b.worker()
	mux := metricsAddress(t, w)
	notReady(t, mux, "clock: this worker's clock is ", "ahead of postgres's, at most 30s is allowed")
	_, metrics := get(t, mux+"/metrics")
	holds(t, metrics, `decuwatch_clock_offset_seconds{against="postgres"} 3`, `decuwatch_ready{part="clock"} 0`)
	w.stop()
}

// Health and metrics answer while half-sent logins occupy the review page and descriptors are scarce.
func TestHealthUnderAttack(t *testing.T) {
	server := natstest.Start(t)
	b := newBench(t, server.URL(), pgtest.URL(t))
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("a token of 24 characters"), 0o600); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w := starting(t, func(args ...string) *exec.Cmd {
		return exec.Command("sh", append([]string{"-c", `ulimit -n 256 && exec "$0" "$@"`, exe}, args...)...)
	}, nil, append([]string{"serve", "-e", faultEnsemble, "--nats.url=" + b.natsURL, "--postgres.url=" + b.pgURL,
		"--metrics.address=127.0.0.1:0", "--review.address=127.0.0.1:0", "--review.token-file=" + token,
		"--scoring.threads=1"}, b.flags...)...)
	mux := metricsAddress(t, w)
	isReady(t, mux)
	review := reviewAddress(t, w)
	for range 300 {
		conn, err := net.Dial("tcp", review)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = fmt.Fprintf(conn, "POST /login HTTP/1.1\r\nHost: %s\r\nContent-Length: 100\r\n\r\nname=", review)
		if err != nil {
			t.Fatal(err)
		}
	}
	descriptors := func() int {
		list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	natstest.Until(t, "the page's connections are at their bound", func() bool { return descriptors() >= 64 })
	for range 5 {
		for _, page := range []string{"/healthz", "/readyz", "/metrics"} {
			if status, body := quickly(t, mux+page); status != 200 {
				t.Errorf("%s: %d %s", page, status, body)
			}
		}
	}
	if n := descriptors(); n > 200 {
		t.Errorf("the process has %d descriptors open", n)
	}
	natstest.Until(t, "the half-sent logins are closed and the page answers", func() bool {
		status, _ := quickly(t, "http://"+review+"/login")
		return status == 200
	})
	w.stop()
}
