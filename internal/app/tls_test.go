package app

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// writeCertificate writes a self-signed certificate for 127.0.0.1 and returns it.
func writeCertificate(t *testing.T, c HTTPTLSConfig, serial int64, written time.Time) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for path, block := range map[string]*pem.Block{
		c.TLSCert: {Type: "CERTIFICATE", Bytes: der}, c.TLSKey: {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, written, written); err != nil {
			t.Fatal(err)
		}
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

func TestHTTPSpeaksTLS(t *testing.T) {
	dir := t.TempDir()
	c := HTTPTLSConfig{TLSCert: filepath.Join(dir, "cert.pem"), TLSKey: filepath.Join(dir, "key.pem")}
	begin := time.Now().Add(-time.Minute)
	first := writeCertificate(t, c, 1, begin)

	listener, err := c.Listen("review", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- ServeHTTP(ctx, listener, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNoContent)
		}))
	}()
	get := func(scheme string, trusted *x509.Certificate) (*http.Response, error) {
		pool := x509.NewCertPool()
		pool.AddCert(trusted)
		client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true, ForceAttemptHTTP2: true,
		}}
		response, err := client.Get(scheme + "://" + listener.Addr().String())
		if err == nil {
			response.Body.Close()
		}
		return response, err
	}
	if r, err := get("https", first); err != nil || r.StatusCode != http.StatusNoContent {
		t.Errorf("over TLS: %v, %v", r, err)
	}
	if r, err := get("http", first); err == nil && r.StatusCode != http.StatusBadRequest {
		t.Errorf("plain HTTP was answered with %s", r.Status)
	}
	second := writeCertificate(t, c, 2, begin.Add(time.Second))
	if r, err := get("https", second); err != nil || r.TLS.PeerCertificates[0].SerialNumber.Int64() != 2 {
		t.Errorf("after the files were replaced: %v", err)
	}
	if err := os.WriteFile(c.TLSKey, []byte("half a ke"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := get("https", second); err != nil {
		t.Errorf("while a file is being written: %v", err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestHTTPTLSRefusals(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		HTTPTLSConfig
		says string
	}{
		{HTTPTLSConfig{TLSCert: "cert.pem"}, "metrics.tls-cert and metrics.tls-key must be given together"},
		{HTTPTLSConfig{TLSKey: "key.pem"}, "metrics.tls-cert and metrics.tls-key must be given together"},
		{HTTPTLSConfig{TLSCert: filepath.Join(dir, "none.pem"), TLSKey: filepath.Join(dir, "none.key")},
			"metrics.tls-cert: open " + filepath.Join(dir, "none.pem")},
	} {
		if l, err := c.Listen("metrics", "127.0.0.1:0"); err == nil || !strings.Contains(err.Error(), c.says) {
			if err == nil {
				l.Close()
			}
			t.Errorf("%+v: %v, want %q", c.HTTPTLSConfig, err, c.says)
		}
	}
}
