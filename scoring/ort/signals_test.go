package ort

import (
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/scoring/ort/internal/foreign"
)

// Signals arrive after runs on the device, and an invalid pointer is a panic.
func TestSignalsArriveAfterRuns(t *testing.T) {
	s := newSession(t, Config{Device: device, Rows: 2})
	for range 2 {
		if err := s.Run(2); err != nil {
			t.Fatal(err)
		}
	}
	received := make(chan os.Signal, 1)
	for _, number := range []syscall.Signal{
		syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGCHLD, syscall.SIGPIPE,
	} {
		signal.Notify(received, number)
		if err := syscall.Kill(os.Getpid(), number); err != nil {
			t.Fatal(err)
		}
		select {
		case <-received:
		case <-time.After(30 * time.Second):
			t.Errorf("%v did not arrive within 30s", number)
		}
		signal.Stop(received)
	}
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	var missing *Session
	_ = missing.rows
}

func TestKeepSignals(t *testing.T) {
	// Go's handler before; a foreign one during the call; Go's again after it, and signals arrive.
	received := make(chan os.Signal, 1)
	signal.Notify(received, syscall.SIGUSR2)
	defer signal.Stop(received)
	err := keepSignals(func() error {
		foreign.Install(int(syscall.SIGUSR2))
		foreign.Install(int(syscall.SIGTERM))
		// What Go installs meanwhile stays.
		signal.Notify(received, syscall.SIGHUP)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []syscall.Signal{syscall.SIGUSR2, syscall.SIGTERM} {
		if foreign.Installed(int(s)) {
			t.Errorf("%v still has the foreign handler", s)
		}
	}
	for _, s := range []syscall.Signal{syscall.SIGUSR2, syscall.SIGHUP} {
		if err := syscall.Kill(os.Getpid(), s); err != nil {
			t.Fatal(err)
		}
		select {
		case <-received:
		case <-time.After(30 * time.Second):
			t.Errorf("%v did not arrive within 30s", s)
		}
	}
}
