package app

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/nats-io/nats.go"

	"github.com/decuwatch/decuwatch/internal/settings"
)

// NATSConfig says how NATS is reached.
type NATSConfig struct {
	// Addresses of the servers, separated by commas.
	URL string `name:"url" default:"nats://127.0.0.1:4222"`
	// Credentials file (JWT and nkey) of the user. Defaults to none.
	Creds string `name:"creds" placeholder:"FILE"`
	// File with the seed of the user's nkey. Defaults to none.
	NKey string `name:"nkey" placeholder:"FILE"`
	// PEM file of the authorities that sign the servers' certificates. Defaults to the system's.
	CA string `name:"ca" placeholder:"FILE"`
	// PEM file of the client's certificate, together with nats.key. Defaults to none.
	Cert string `name:"cert" placeholder:"FILE"`
	// PEM file of the client certificate's key. Defaults to none.
	Key string `name:"key" placeholder:"FILE"`
	// Start with the TLS handshake, as servers with handshake_first in their tls block require.
	TLSHandshakeFirst bool `name:"tls-handshake-first"`
	// Subject below which replies are received; give each user its own if their permissions keep them apart.
	InboxPrefix string `name:"inbox-prefix" default:"_INBOX"`
}

// Check returns an error that names the settings out of their bounds.
func (c NATSConfig) Check() error {
	for address := range strings.SplitSeq(c.URL, ",") {
		u, err := url.Parse(strings.TrimSpace(address))
		if err != nil || u.Host == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) {
			return settings.Errorf("nats.url is %q, must name servers: nats://host:4222 or tls://host:4222",
				settings.Redact(c.URL))
		}
	}
	switch {
	case (c.Cert == "") != (c.Key == ""):
		return settings.Errorf("nats.cert and nats.key must be given together")
	case c.Creds != "" && c.NKey != "":
		return settings.Errorf("nats.creds and nats.nkey must not both be given")
	}
	err := nats.CustomInboxPrefix(c.InboxPrefix)(&nats.Options{})
	if err != nil || strings.ContainsFunc(c.InboxPrefix, unicode.IsSpace) {
		return settings.Errorf("nats.inbox-prefix is %q, must be a subject without wildcards", c.InboxPrefix)
	}
	return nil
}

// Connect connects, and reconnects forever. The first connection must succeed unless wait is set.
func (c NATSConfig) Connect(name string, wait bool, log *slog.Logger) (*nats.Conn, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	told := &natsLog{config: c, log: log}
	opts := []nats.Option{
		nats.Name("decuwatch " + name), nats.MaxReconnects(-1), nats.ReconnectWait(500 * time.Millisecond),
		nats.Timeout(connectTimeout), nats.RetryOnFailedConnect(wait), nats.CustomInboxPrefix(c.InboxPrefix),
		nats.IgnoreAuthErrorAbort(), // credentials may become valid
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("lost the connection to NATS", "err", err)
			}
		}),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) { told.failed(err) }),
		nats.ConnectHandler(told.connected),
		nats.ReconnectHandler(told.reconnected),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { told.reported(err) }),
	}
	if c.Creds != "" {
		opts = append(opts, nats.UserCredentials(c.Creds))
	}
	if c.NKey != "" {
		nkey, err := nats.NkeyOptionFromSeed(c.NKey)
		if err != nil {
			return nil, fmt.Errorf("nats.nkey: %w", err)
		}
		opts = append(opts, nkey)
	}
	if c.CA != "" {
		opts = append(opts, nats.RootCAs(c.CA))
	}
	if c.Cert != "" {
		opts = append(opts, nats.ClientCert(c.Cert, c.Key))
	}
	if c.TLSHandshakeFirst {
		opts = append(opts, nats.TLSHandshakeFirst())
	}
	nc, err := nats.Connect(c.URL, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS at %s: %w", settings.Redact(c.URL), c.explain(err))
	}
	if wait {
		go told.follow(nc)
	}
	return nc, nil
}

const connectTimeout = 5 * time.Second

// explain adds to a connection error what it most likely says about nats.tls-handshake-first.
func (c NATSConfig) explain(err error) error {
	var timeout net.Error
	var record tls.RecordHeaderError
	switch {
	case c.TLSHandshakeFirst && errors.As(err, &record):
		return fmt.Errorf("%w: nats.tls-handshake-first is set, but the server does not begin with TLS "+
			"(handshake_first is off there)", err)
	case !c.TLSHandshakeFirst && (errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, io.EOF)):
		return fmt.Errorf("%w: the server sent no greeting; a server with handshake_first in its tls block needs "+
			"nats.tls-handshake-first", err)
	}
	return err
}
