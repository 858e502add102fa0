package app

import (
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// Why NATS cannot be used is in the log with its cause, once while it lasts.
func TestNATSErrorsAreLogged(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "nats://" + closed.Addr().String()
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	guarded := natsServer(t, &server.Options{Users: []*server.User{
		{Username: "monitor", Password: "right", Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: []string{">"}},
			Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX_monitor.>"}},
		}},
	}})
	address := func(password string) string { return "nats://monitor:" + password + "@" + guarded.Addr().String() }
	for _, c := range []struct {
		name, url, inbox string
		want             []string
	}{
		{"nobody listens", nobody, "_INBOX", []string{"cannot connect to NATS", "connection refused"}},
		{"wrong credentials", address("wrong"), "_INBOX", []string{"cannot connect to NATS", "Authorization Violation"}},
		{"forbidden inbox", address("right"), "_INBOX", []string{"ermissions", "set nats.inbox-prefix"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := DefaultConfig().NATS
			cfg.URL, cfg.InboxPrefix = c.url, c.inbox
			var log logBuffer
			nc, err := cfg.Connect("test", true, slog.New(slog.NewTextHandler(&log, nil)))
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			_, _ = nc.Request("anything", nil, 100*time.Millisecond) // nobody answers; the log says why
			for _, want := range c.want {
				for end := time.Now().Add(time.Minute); !strings.Contains(log.String(), want); time.Sleep(20 * time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("the log says %q, not %q", log.String(), want)
					}
				}
			}
			if strings.Contains(log.String(), "wrong@") || strings.Contains(log.String(), "right@") {
				t.Errorf("the log shows a password: %s", log.String())
			}
			if n := strings.Count(log.String(), "cannot connect"); n > 1 {
				t.Errorf("the same cause is logged %d times: %s", n, log.String())
			}
		})
	}
}
