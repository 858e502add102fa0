package app

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/decuwatch/decuwatch/internal/settings"
)

// repeatEvery is the interval at which an error that lasts is logged again.
const repeatEvery = time.Minute

// natsLog logs why there is no connection to NATS: once for each cause, then every minute.
type natsLog struct {
	config NATSConfig
	log    *slog.Logger

	failures lately // empty while the connection works
	reports  lately
}

// lately remembers what was logged in the last minute.
type lately struct {
	mu     sync.Mutex
	logged map[string]time.Time // by the cause
}

// first reports whether a cause was not logged in the last minute, and remembers it.
func (r *lately) first(cause string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	// A cause may name the port of the attempt, which never comes again.
	maps.DeleteFunc(r.logged, func(_ string, at time.Time) bool { return time.Since(at) >= repeatEvery })
	if _, ok := r.logged[cause]; ok {
		return false
	}
	if r.logged == nil {
		r.logged = map[string]time.Time{}
	}
	r.logged[cause] = time.Now()
	return true
}

// forget reports whether something was remembered, and forgets it.
func (r *lately) forget() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	some := len(r.logged) > 0
	clear(r.logged)
	return some
}

// failed logs an attempt to connect that failed.
func (l *natsLog) failed(err error) {
	if err == nil || errors.Is(err, nats.ErrNoServers) { // the next attempt says why
		return
	}
	if err = l.config.explain(err); l.failures.first(err.Error()) {
		l.log.Warn("cannot connect to NATS, trying again", "nats", settings.Redact(l.config.URL), "err", err)
	}
}

// connected logs the first connection if an attempt before it failed.
func (l *natsLog) connected(nc *nats.Conn) {
	if l.failures.forget() {
		l.reconnected(nc)
	}
}

// reconnected logs that the connection works again.
func (l *natsLog) reconnected(nc *nats.Conn) {
	l.failures.forget()
	l.log.Info("connected to NATS again", "server", nc.ConnectedUrlRedacted())
}

// follow logs, until the connection is closed, the errors of attempts that no callback is told: refused credentials.
func (l *natsLog) follow(nc *nats.Conn) {
	closed := nc.StatusChanged(nats.CLOSED)
	tick := time.NewTicker(time.Second / 4)
	defer tick.Stop()
	for !nc.IsClosed() {
		select {
		case <-closed:
		case <-tick.C:
			if err := nc.LastError(); !nc.IsConnected() && (errors.Is(err, nats.ErrAuthorization) ||
				errors.Is(err, nats.ErrAuthExpired) || errors.Is(err, nats.ErrAuthRevoked)) {
				l.failed(err)
			}
		}
	}
}

// reported logs what the server reports about a connection that works, each cause once a minute.
func (l *natsLog) reported(err error) {
	cause := err.Error()
	if text := err.Error(); errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(text, "Subscription to") &&
		strings.Contains(text, `"`+l.config.InboxPrefix+".") {
		err = fmt.Errorf("%w: this user may not receive replies below %s; set nats.inbox-prefix to the prefix that its "+
			"permissions name", err, l.config.InboxPrefix)
		cause = "inbox" // each request may have one of its own
	}
	if l.reports.first(cause) {
		l.log.Warn("NATS reports an error", "err", err)
	}
}
