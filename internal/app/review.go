package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"regexp"
	"strings"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/prometheus/client_golang/prometheus"
)

// ReviewConfig says what enters review beside alerts, how evidence is made, and who may see the review page.
type ReviewConfig struct {
	// Share of scores without an alert that enter review unmarked, so that recall can be estimated; 0 to 1.
	Share float64 `name:"share" default:"0.01" min:"0" max:"1"`
	// Address of the review page; port 0 is any free one, none is no page. One that other machines reach takes
	// review.token-file or review.trusted-header.
	Address string `name:"address" default:"127.0.0.1:8080"`
	// File with the token that reviewers log in with, 16 characters or more. Defaults to none.
	TokenFile string `name:"token-file" placeholder:"FILE"`
	// Header in which the proxy before the page names the user that it has authenticated. Defaults to none.
	TrustedHeader string `name:"trusted-header" placeholder:"NAME"`
	// Addresses of proxies whose review.trusted-header is believed. Defaults to loopback.
	TrustedProxies []string `name:"trusted-proxies" placeholder:"CIDR"`
	HTTPTLSConfig
	// Where reviewers reach the page from outside: https://review.example.com. Defaults to none.
	URL string `name:"url" placeholder:"URL"`
	// Requests that are rerun for their evidence at a time, behind live work; 0 leaves evidence to other processes.
	Workers int `name:"workers" default:"1" min:"0" max:"64"`
	// Attempts to make one request's evidence, at most.
	EvidenceAttempts int `name:"evidence-attempts" default:"4" min:"1"`
	// Longer side of a stored image in pixels, 16 to 512; larger ones are scaled down.
	ImageSide int `name:"image-side" default:"512" min:"16" max:"512"`
}

// headerName is a token of RFC 9110.
var headerName = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")

// NoPage is the address that turns the review page off.
const NoPage = "none"

func (c ReviewConfig) Check() error {
	if c.Address != NoPage {
		if err := settings.HostPort("review.address", c.Address); err != nil {
			return fmt.Errorf("%w, or %s", err, NoPage)
		}
	}
	if c.TokenFile != "" && c.TrustedHeader != "" {
		return settings.Errorf("review.token-file and review.trusted-header must not both be given")
	}
	if len(c.TrustedProxies) > 0 && c.TrustedHeader == "" {
		return settings.Errorf("review.trusted-proxies is given without review.trusted-header")
	}
	if c.TrustedHeader != "" && !headerName.MatchString(c.TrustedHeader) {
		return settings.Errorf("review.trusted-header is %q, must be the name of a header", c.TrustedHeader)
	}
	if _, err := c.proxies(); err != nil {
		return err
	}
	return errors.Join(c.pair("review"), settings.WebAddress("review.url", c.URL), settings.Check("review", c))
}

func (c ReviewConfig) proxies() ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, s := range c.TrustedProxies {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			ip, err := netip.ParseAddr(s)
			if err != nil {
				return nil, settings.Errorf("review.trusted-proxies: %q is not an address or a CIDR", s)
			}
			p = netip.PrefixFrom(ip, ip.BitLen())
		}
		list = append(list, p)
	}
	return list, nil
}

// access reads who may see the page.
func (c ReviewConfig) access() (review.Access, error) {
	a := review.Access{Header: c.TrustedHeader, URL: c.URL, TLS: c.TLSCert != "", Reviewer: UserName()}
	var err error
	if a.Proxies, err = c.proxies(); err != nil {
		return a, err
	}
	if c.TokenFile != "" {
		token, err := os.ReadFile(c.TokenFile)
		if err != nil {
			return a, fmt.Errorf("review.token-file: %w", err)
		}
		if a.Token = strings.TrimSpace(string(token)); a.Token == "" {
			return a, settings.Errorf("review.token-file: %s is empty", c.TokenFile)
		}
	}
	return a, nil
}

// ReviewLink begins the links to reviews on the page at url; "" where there is no page.
func ReviewLink(url string) string {
	if url == "" {
		return ""
	}
	return strings.TrimSuffix(url, "/") + "/review/"
}

// UserName returns the name of the user who runs this.
func UserName() string {
	if u, err := user.Current(); err == nil && u.Username != "" {
		return u.Username
	}
	return "local"
}

// serveReview runs the evidence worker and the page, and returns the page's address, or "" where there is none.
func serveReview(c ReviewConfig, store *postgres.Store, engines map[string]*scoring.Engine, reg prometheus.Registerer, log *slog.Logger, life *Lifecycle) (string, error) {
	if c.Workers > 0 {
		gatherers := make([]review.Gatherer, 0, len(engines))
		for _, e := range engines {
			gatherers = append(gatherers, e)
		}
		worker, err := review.NewWorker(store, gatherers, review.WorkerConfig{
			Workers: c.Workers, MaxAttempts: c.EvidenceAttempts, ImageSide: c.ImageSide, Registerer: reg, Log: log,
		})
		if err != nil {
			return "", err
		}
		life.Run("evidence", worker.Run)
	}
	if c.Address == NoPage {
		return "", nil
	}
	access, err := c.access()
	if err != nil {
		return "", err
	}
	listener, err := c.Listen("review", c.Address)
	if err != nil {
		return "", err
	}
	page, err := review.NewPage(store, listener.Addr(), review.PageConfig{Access: access, Registerer: reg, Log: log})
	if err != nil {
		return "", errors.Join(err, listener.Close())
	}
	life.Run("review page", func(ctx context.Context) error { return ServeHTTP(ctx, listener, page) })
	return listener.Addr().String(), nil
}
