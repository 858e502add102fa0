package app

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// freeAddress returns an address on loopback that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// status returns the status and the body of a page; 0 if nobody answers.
func status(t *testing.T, url string) (int, string) {
	t.Helper()
	response, err := http.Get(url) //nolint:noctx // the test has a deadline of its own
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Error(err)
	}
	return response.StatusCode, string(body)
}

// TestServeWaitsForPostgres starts a monitor while Postgres is away: it lives, is not ready and says why, logs each
// attempt, and serves when Postgres is back. A monitor that is stopped while it waits ends without an error.
func TestServeWaitsForPostgres(t *testing.T) {
	options := local.Options{Dir: t.TempDir(), Settings: map[string]string{"fsync": "off"}}
	db, err := local.Start(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	url := db.URL()
	if err := postgres.Migrate(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	if err := db.Stop(); err != nil {
		t.Fatal(err)
	}
	c := serveConfig(t)
	c.Postgres.URL, c.Metrics.Address = url, freeAddress(t)
	serve := func(log *logBuffer) (stop func(), ended chan error) {
		ctx, cancel := context.WithCancel(t.Context())
		ended = make(chan error, 1)
		go func() { ended <- Serve(ctx, c, Options{Log: slog.New(slog.NewTextHandler(log, nil))}) }()
		natstest.Until(t, "two attempts are logged", func() bool {
			return strings.Count(log.String(), "Postgres is away, trying again") >= 2
		})
		return cancel, ended
	}
	var log logBuffer
	stop, ended := serve(&log)
	page := "http://" + c.Metrics.Address
	if code, body := status(t, page+"/healthz"); code != http.StatusOK {
		t.Errorf("/healthz: %d %s", code, body)
	}
	if code, body := status(t, page+"/readyz"); code != http.StatusServiceUnavailable ||
		!strings.Contains(body, "postgres: ") || !strings.Contains(body, "connection refused") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("stopped while it waits: %v", err)
	}

	log = logBuffer{}
	stop, ended = serve(&log)
	defer stop()
	if db, err = local.Start(t.Context(), options); err != nil {
		t.Fatal(err)
	}
	defer db.Stop()
	if db.URL() != url {
		t.Fatalf("Postgres is back at %s, was at %s", db.URL(), url)
	}
	natstest.Until(t, "it is ready", func() bool {
		code, _ := status(t, page+"/readyz")
		return code == http.StatusOK
	})
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestServeRefusesWhatDoesNotGoAway starts monitors that no waiting would help.
func TestServeRefusesWhatDoesNotGoAway(t *testing.T) {
	c := serveConfig(t)
	good := c.Postgres.URL
	for name, url := range map[string]string{
		"no such database": good[:strings.LastIndex(good, "/")] + "/nobody",
		"wrong password":   pgtest.As(t, good, "nobody", "wrong"),
		"not migrated":     pgtest.EmptyURL(t),
	} {
		c.Postgres.URL = url
		var log logBuffer
		err := Serve(t.Context(), c, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err == nil || strings.Contains(log.String(), "trying again") {
			t.Errorf("%s: %v\n%s", name, err, &log)
		}
	}
}
