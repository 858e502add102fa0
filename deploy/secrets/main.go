// Command secrets makes the secrets of a deployment: nkeys of the NATS users, passwords of Postgres, Grafana and the
// review page, and, with -tls, a certificate authority with a certificate for the NATS server. Existing files stay.
//
//	go run ./deploy/secrets -dir deploy/.secrets [-tls nats,localhost]
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nats-io/nkeys"
)

// users are the NATS users, as nats-server.conf names them.
var users = []string{"producer", "canary", "worker", "subscriber", "operator"}

// passwords are the files that hold one password, or token, each.
var passwords = []string{"postgres-superuser", "postgres-owner", "postgres-writer", "postgres-reader", "grafana-admin",
	"review-token"}

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintf(os.Stderr, "secrets: %v\n", err)
		}
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	flags := flag.NewFlagSet("secrets", flag.ContinueOnError)
	dir := flags.String("dir", "deploy/.secrets", "directory that holds the secrets")
	hosts := flags.String("tls", "", "switch TLS on: names and addresses of the NATS server, separated by commas")
	host := flags.String("postgres", "postgres:5432", "host and port of Postgres, for its password file")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	// The directory is closed to others. Its files are readable, because a container's user must read its mounts.
	nats := filepath.Join(*dir, "nats")
	if err := os.MkdirAll(nats, 0o755); err != nil { //nolint:gosec // its parent is closed
		return err
	}
	err := errors.Join(os.Chmod(*dir, 0o700), os.Chmod(nats, 0o755)) //nolint:gosec // its parent is closed
	if err != nil {
		return err
	}
	m := maker{dir: *dir, out: out}
	if err := m.nkeys(); err != nil {
		return err
	}
	if err := m.passwords(*host); err != nil {
		return err
	}
	return m.tls(*hosts)
}

type maker struct {
	dir string
	out io.Writer
}

// write writes a file that the users of containers can read, whatever the umask.
func (m maker) write(name, content string) error {
	path := filepath.Join(m.dir, name)
	if err := os.WriteFile(path, []byte(content), fileMode); err != nil {
		return err
	}
	return os.Chmod(path, fileMode)
}

// fileMode is the mode of every file. The directory is closed to others.
const fileMode fs.FileMode = 0o644

// once returns the content of a file. If the file is missing, create makes it.
func (m maker) once(name string, create func() (string, error)) (string, error) {
	path := filepath.Join(m.dir, name)
	b, err := os.ReadFile(path)
	if err == nil {
		return string(b), os.Chmod(path, fileMode) // one that an earlier umask closed
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	content, err := create()
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	if err := m.write(name, content); err != nil {
		return "", err
	}
	fmt.Fprintln(m.out, "made", path)
	return content, nil
}

// nkeys makes a seed for each user and the file that tells the server their public keys.
func (m maker) nkeys() error {
	var public strings.Builder
	public.WriteString("# Public keys of the users, made by deploy/secrets. nats-server.conf includes this file.\n")
	for _, user := range users {
		seed, err := m.once("nats-"+user+".nk", func() (string, error) {
			pair, err := nkeys.CreateUser()
			if err != nil {
				return "", err
			}
			seed, err := pair.Seed()
			return string(seed) + "\n", err
		})
		if err != nil {
			return err
		}
		pair, err := nkeys.FromSeed([]byte(strings.TrimSpace(seed)))
		if err != nil {
			return fmt.Errorf("nats-%s.nk: %w", user, err)
		}
		key, err := pair.PublicKey()
		if err != nil {
			return fmt.Errorf("nats-%s.nk: %w", user, err)
		}
		fmt.Fprintf(&public, "%s = %q\n", strings.ToUpper(user)+"_NKEY", key)
	}
	return m.write("nats/users.conf", public.String())
}

// passwords makes the passwords, and the password file with which the monitor reaches Postgres.
func (m maker) passwords(postgres string) error {
	secret := map[string]string{}
	for _, name := range passwords {
		s, err := m.once(name, func() (string, error) { return rand.Text() + "\n", nil })
		if err != nil {
			return err
		}
		secret[name] = strings.TrimSpace(s)
	}
	for user, name := range map[string]string{
		"decuwatch_owner": "postgres-owner", "decuwatch_monitor": "postgres-writer",
	} {
		// libpq ignores a password file that others can read; pgx does not mind.
		line := fmt.Sprintf("%s:*:%s:%s\n", postgres, user, secret[name])
		if err := m.write("pgpass-"+strings.TrimPrefix(name, "postgres-"), line); err != nil {
			return err
		}
	}
	return nil
}

const years = 2

// keptTLS keeps the TLS settings that are there, readable; without any it writes that there is no TLS.
func (m maker) keptTLS(conf string) error {
	var errs []error
	for _, name := range []string{conf, "nats/ca.pem", "nats/server.pem", "nats/server-key.pem"} {
		if err := os.Chmod(filepath.Join(m.dir, name), fileMode); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		} else if name == conf {
			errs = append(errs, m.write(conf, "# No TLS. Make it with: go run ./deploy/secrets -tls HOST,...\n"))
		}
	}
	return errors.Join(errs...)
}

// tls writes the server's TLS settings: none, or a private authority and a certificate for the hosts.
func (m maker) tls(hosts string) error {
	const conf = "nats/tls.conf"
	if hosts == "" {
		return m.keptTLS(conf)
	}
	blocks, err := certify(hosts)
	if err != nil {
		return err
	}
	for name, block := range blocks {
		if err := m.write(name, string(pem.EncodeToMemory(block))); err != nil {
			return err
		}
		fmt.Fprintln(m.out, "made", filepath.Join(m.dir, name))
	}
	// The server reads paths relative to its working directory, so these are the paths in its container.
	return m.write(conf, `# Made by deploy/secrets.
tls {
  cert_file: "/etc/nats/secrets/server.pem"
  key_file: "/etc/nats/secrets/server-key.pem"
  timeout: 5
}
`)
}

// certify makes an authority and a certificate for the hosts, and returns their files by name. The authority's key is
// forgotten, so a new certificate comes with a new authority.
func certify(hosts string) (map[string]*pem.Block, error) {
	authority, server := template("decuwatch authority"), template("nats-server")
	authority.IsCA, authority.BasicConstraintsValid, authority.KeyUsage = true, true, x509.KeyUsageCertSign
	server.KeyUsage, server.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for host := range strings.SplitSeq(hosts, ",") {
		if ip := net.ParseIP(host); ip != nil {
			server.IPAddresses = append(server.IPAddresses, ip)
		} else {
			server.DNSNames = append(server.DNSNames, host)
		}
	}
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serverKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	authorityDER, err := x509.CreateCertificate(rand.Reader, authority, authority, authorityKey.Public(), authorityKey)
	if err != nil {
		return nil, err
	}
	serverDER, err := x509.CreateCertificate(rand.Reader, server, authority, serverKey.Public(), authorityKey)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(serverKey)
	if err != nil {
		return nil, err
	}
	return map[string]*pem.Block{
		"nats/ca.pem":         {Type: "CERTIFICATE", Bytes: authorityDER},
		"nats/server.pem":     {Type: "CERTIFICATE", Bytes: serverDER},
		"nats/server-key.pem": {Type: "PRIVATE KEY", Bytes: keyDER},
	}, nil
}

// template returns a certificate that is valid from an hour ago. Its serial number is drawn when it is signed.
func template(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(years, 0, 0),
	}
}
