package app

import (
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/decuwatch/decuwatch/internal/settings"
)

// Listen binds the address of the server that section configures, with TLS if it has a certificate.
func (c HTTPTLSConfig) Listen(section, address string) (net.Listener, error) {
	if err := c.pair(section); err != nil {
		return nil, err
	}
	var certificates *certificateFiles
	if c.TLSCert != "" {
		certificates = &certificateFiles{cert: c.TLSCert, key: c.TLSKey}
		if _, err := certificates.get(nil); err != nil {
			return nil, fmt.Errorf("%s.tls-cert: %w", section, err)
		}
	}
	listener, err := Listen(section+".address", address) // bounded below TLS, so that a handshake counts
	if err != nil {
		return nil, err
	}
	if certificates != nil {
		listener = tls.NewListener(listener, &tls.Config{
			GetCertificate: certificates.get, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
		})
	}
	return listener, nil
}

// pair returns an error if only one of certificate and key is given.
func (c HTTPTLSConfig) pair(section string) error {
	if (c.TLSCert == "") != (c.TLSKey == "") {
		return settings.Errorf("%s.tls-cert and %[1]s.tls-key must be given together", section)
	}
	return nil
}

// scheme returns the scheme of the server's addresses.
func (c HTTPTLSConfig) scheme() string {
	if c.TLSCert != "" {
		return "https"
	}
	return "http"
}

// certificateFiles is a certificate and its key, which may be replaced at any time.
type certificateFiles struct {
	cert, key string

	mu      sync.Mutex
	loaded  *tls.Certificate
	changed time.Time // modification time of the newer file
}

// get returns the certificate, which it reads again if a file has changed. While the new pair does not fit together, as
// between two writes, it returns the former certificate.
func (f *certificateFiles) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var changed time.Time
	for _, path := range []string{f.cert, f.key} {
		if info, err := os.Stat(path); err == nil && info.ModTime().After(changed) {
			changed = info.ModTime()
		}
	}
	if f.loaded != nil && changed.Equal(f.changed) {
		return f.loaded, nil
	}
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		if f.loaded != nil {
			return f.loaded, nil
		}
		return nil, err
	}
	f.loaded, f.changed = &pair, changed
	return f.loaded, nil
}
