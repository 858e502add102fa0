package app

import (
	"context"
	"crypto/tls"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// logBuffer keeps what is logged by several goroutines.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// natsServer runs the real server with options that natstest does not have.
func natsServer(t *testing.T, o *server.Options) *server.Server {
	t.Helper()
	o.Host, o.Port, o.StoreDir, o.NoLog, o.NoSigs = "127.0.0.1", server.RANDOM_PORT, t.TempDir(), true, true
	s, err := server.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(time.Minute) {
		t.Fatal("nats-server does not start")
	}
	return s
}

// TestHandshakeFirst reaches a server that begins with TLS by the setting, and says what is wrong when either side
// has it alone.
func TestHandshakeFirst(t *testing.T) {
	files := HTTPTLSConfig{TLSCert: t.TempDir() + "/cert.pem", TLSKey: t.TempDir() + "/key.pem"}
	writeCertificate(t, files, 1, time.Now())
	pair, err := tls.LoadX509KeyPair(files.TLSCert, files.TLSKey)
	if err != nil {
		t.Fatal(err)
	}
	options := func(first bool, timeout float64) *server.Options {
		return &server.Options{TLS: true, TLSTimeout: timeout, TLSHandshakeFirst: first,
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}}
	}
	for _, c := range []struct {
		name         string
		server, ours bool
		timeout      float64 // of the server's handshake, in seconds
		want         string
	}{
		{"both", true, true, 60, ""},
		{"neither", false, false, 60, ""},
		{"the server alone", true, false, 60, "nats.tls-handshake-first"},
		{"the server alone, which gives up first", true, false, 1, "nats.tls-handshake-first"},
		{"the monitor alone", false, true, 60, "nats.tls-handshake-first"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := natsServer(t, options(c.server, c.timeout))
			cfg := DefaultConfig().NATS
			cfg.URL, cfg.CA, cfg.TLSHandshakeFirst = "tls://"+s.Addr().String(), files.TLSCert, c.ours
			nc, err := cfg.Connect("test", false, slog.New(slog.DiscardHandler))
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				nc.Close()
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want an error that names %s", err, c.want)
			}
			// A worker that waits for NATS says the same in its log.
			var log logBuffer
			nc, err = cfg.Connect("test", true, slog.New(slog.NewTextHandler(&log, nil)))
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			for end := time.Now().Add(time.Minute); !strings.Contains(log.String(),
				c.want); time.Sleep(20 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("the log says %q", log.String())
				}
			}
		})
	}
}

// TestNoRoomForStreams ends with an error that names the settings, the sizes and what the account has, at every place
// that creates a stream.
func TestNoRoomForStreams(t *testing.T) {
	js := func(t *testing.T, most int64) (jetstream.JetStream, string) {
		s := natsServer(t, &server.Options{JetStream: true, JetStreamMaxStore: most})
		cfg := DefaultConfig().NATS
		cfg.URL = s.ClientURL()
		nc, err := cfg.Connect("test", false, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		return js, s.ClientURL()
	}
	want := func(t *testing.T, err error) {
		t.Helper()
		if err == nil {
			t.Fatal("no error")
		}
		for _, part := range []string{"stream.max-bytes", "8589934592", "alerts.max-bytes", "4294967296", "21475885056",
			"reserved",
			"max_file_store"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%v does not say %s", err, part)
			}
		}
	}
	defaults := DefaultConfig()
	t.Run("events", func(t *testing.T) {
		js, _ := js(t, 1<<30)
		_, err := consumers.EnsureStream(t.Context(), js, defaults.Stream)
		want(t, ExplainRoom(t.Context(), js, defaults.Stream, defaults.Alerts, err))
	})
	t.Run("consumers do not try again", func(t *testing.T) {
		js, _ := js(t, 12<<30) // events fit, advisories do not
		cfg := defaults.Consumers
		cfg.Stream, cfg.Models = defaults.Stream, []string{"m"}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		runner, err := consumers.New(js, idle{}, cfg)
		if err != nil {
			t.Fatal(err)
		}
		want(t, ExplainRoom(ctx, js, defaults.Stream, defaults.Alerts, runner.Run(ctx)))
	})
	t.Run("alerts", func(t *testing.T) {
		js, _ := js(t, 1<<30)
		sink := alerts.NewStreamSink(js, defaults.Alerts.StreamConfig)
		want(t, ExplainRoom(t.Context(), js, defaults.Stream, defaults.Alerts, ensureOnce(t.Context(), js.Conn(),
			"stream of alerts", slog.New(slog.DiscardHandler), sink.Ensure)))
	})
	t.Run("serve", func(t *testing.T) {
		_, url := js(t, 1<<30)
		c := DefaultConfig()
		c.Scoring.Ensembles, c.NATS.URL, c.Postgres.URL = []string{"../../ensembles/fashion-mnist"}, url, pgtest.URL(t)
		c.Metrics.Address, c.Review.Address = "127.0.0.1:0", NoPage
		want(t, Serve(t.Context(), c, Options{Log: slog.New(slog.DiscardHandler)}))
	})
}

// idle handles nothing.
type idle struct{}

func (idle) Plan(
	context.Context, schema.Event, schema.Delivery,
) (int, func(context.Context, schema.Delivery) error, error) {
	return 1, func(context.Context, schema.Delivery) error { return nil }, nil
}
func (idle) DeadLetter(context.Context, schema.Verdict) error { return nil }
