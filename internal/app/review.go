package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/user"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// ReviewConfig says what enters review, how evidence is made, and where the page is served.
type ReviewConfig struct {
	review.Config
	// Address of the review page; port 0 is any free one, none turns the page off. An address that other machines reach
	// takes review.token-file or review.trusted-header.
	Address string `name:"address" default:"127.0.0.1:8080"`
	HTTPTLSConfig
}

// NoPage is the address that turns the review page off.
const NoPage = "none"

// Check returns an error that names the settings out of their bounds.
func (c ReviewConfig) Check() error {
	if c.Address != NoPage {
		if err := settings.HostPort("review.address", c.Address); err != nil {
			return fmt.Errorf("%w, or %s", err, NoPage)
		}
	}
	return errors.Join(c.pair("review"), c.Config.Check())
}

// ReviewLink returns the beginning of the links to reviews on the page at url; "" if there is no page.
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

// newEvidence returns the worker that makes evidence, or nil if other processes make it.
func newEvidence(c ReviewConfig, store *postgres.Store, engines []*scoring.Engine, reg prometheus.Registerer,
	log *slog.Logger,
) (*review.Worker, error) {
	if c.Workers == 0 {
		return nil, nil
	}
	var gatherers []review.Gatherer
	for _, e := range engines {
		gatherers = append(gatherers, e)
	}
	c.Registerer, c.Log = reg, log
	return review.NewWorker(store, gatherers, c.WorkerConfig)
}

// servePage serves the review page and returns its address, or "" if the page is off.
func servePage(c ReviewConfig, store *postgres.Store, reg prometheus.Registerer, log *slog.Logger, life *Lifecycle,
) (string, error) {
	if c.Address == NoPage {
		return "", nil
	}
	access, err := c.Access()
	if err != nil {
		return "", err
	}
	access.TLS, access.Reviewer = c.TLSCert != "", UserName()
	listener, err := c.Listen("review", c.Address)
	if err != nil {
		return "", err
	}
	if c.URL != "" {
		promauto.With(reg).NewGauge(prometheus.GaugeOpts{
			Name: "decuwatch_review_page_info", Help: "1; the label url says where reviewers reach the page (review.url).",
			ConstLabels: prometheus.Labels{"url": strings.TrimSuffix(c.URL, "/")},
		}).Set(1)
	}
	page, err := review.NewPage(store, listener.Addr(), review.PageConfig{Access: access, Registerer: reg, Log: log})
	if err != nil {
		return "", errors.Join(err, listener.Close())
	}
	life.Run("review page", func(ctx context.Context) error { return ServeHTTP(ctx, listener, page) })
	return listener.Addr().String(), nil
}
