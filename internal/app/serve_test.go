package app

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// serveConfig returns the configuration of a monitor with the tiny ensemble, on free ports.
func serveConfig(t *testing.T) Config {
	c := DefaultConfig()
	c.NATS.URL, c.Postgres.URL = natstest.Start(t).URL(), pgtest.URL(t)
	c.Scoring.Ensembles, c.Scoring.Threads = []string{"../../scoring/testdata/tiny"}, 1
	c.Metrics.Address, c.Review.Address = "127.0.0.1:0", "127.0.0.1:0"
	return c
}

// TestServeReportsItsAddresses serves on port 0 and ends without an error when its context does.
func TestServeReportsItsAddresses(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	up, ended := make(chan Serving, 1), make(chan error, 1)
	c := serveConfig(t)
	go func() {
		ended <- Serve(ctx, c, Options{
			Log: slog.New(slog.DiscardHandler), Version: "v1.2.3", Started: func(s Serving) { up <- s },
		})
	}()
	var s Serving
	select {
	case s = <-up:
	case err := <-ended:
		t.Fatal(err)
	}
	page := func(address string) string {
		response, err := http.Get("http://" + address) //nolint:noctx // the test has a deadline of its own
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != http.StatusOK {
			t.Errorf("%s: %s, %v", address, response.Status, err)
		}
		return string(body)
	}
	if metrics := page(s.Metrics + "/metrics"); !strings.Contains(metrics, `version="v1.2.3"`) {
		t.Errorf("the metrics do not name the version:\n%s", metrics)
	}
	natstest.Until(t, "it is ready", func() bool {
		response, err := http.Get("http://" + s.Metrics + "/readyz") //nolint:noctx // as above
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == http.StatusOK
	})
	page(s.Review)
	if s.Engines["tiny"] == nil {
		t.Errorf("engines %v", s.Engines)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestServeBindsBeforeItTakesEvents gives the review page an address that is in use.
func TestServeBindsBeforeItTakesEvents(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	c := serveConfig(t)
	c.Review.Address = taken.Addr().String()
	err = Serve(t.Context(), c, Options{Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "listen on review.address") {
		t.Errorf("error is %v", err)
	}
	js, err := jetstream.New(natstest.Connect(t, c.NATS.URL))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Stream(t.Context(), c.Stream.Name); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("the stream of events: %v, want that nothing has looked at it", err)
	}
}
