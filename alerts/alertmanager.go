package alerts

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/decuwatch/decuwatch/schema"
)

// AlertmanagerConfig is the configuration of an [Alertmanager].
type AlertmanagerConfig struct {
	URL          string            // of the Alertmanager, without /api/v2
	Labels       map[string]string // added to each alert
	ResolveAfter time.Duration     // how long an alert stays active without another of its kind. Defaults to 1 h
	Link         string            // prefix of the link to an alert, its id follows; "" makes no link
	Client       *http.Client
}

// Alertmanager posts alerts to Prometheus Alertmanager's API v2. Alertmanager keeps alerts apart by their labels: here
// alertname, model, class, class_index, measurement, severity, reason and kind. So requests of one class that pass one
// threshold are one alert there, which stays active until no alert came for a while; its annotations are from the
// newest.
type Alertmanager struct {
	cfg    AlertmanagerConfig
	client *http.Client
	now    func() time.Time
	ahead  atomic.Int64 // nanoseconds that Alertmanager's clock was ahead of ours at its last answer
}

// NewAlertmanager returns the sink. The error names the field that is wrong.
func NewAlertmanager(cfg AlertmanagerConfig) (*Alertmanager, error) {
	cfg.ResolveAfter = cmp.Or(cfg.ResolveAfter, time.Hour)
	if err := checkURL(cfg.URL); err != nil {
		return nil, fmt.Errorf("alerts: alertmanager: URL: %w", err)
	}
	if cfg.ResolveAfter < 0 {
		return nil, fmt.Errorf("alerts: alertmanager: ResolveAfter %s is negative", cfg.ResolveAfter)
	}
	return &Alertmanager{cfg: cfg, client: client(cfg.Client), now: time.Now}, nil
}

// Name returns [schema.SinkAlertmanager].
func (s *Alertmanager) Name() schema.Sink { return schema.SinkAlertmanager }

// postable is an alert as Alertmanager's API v2 takes it.
type postable struct {
	Labels       map[string]string `json:"labels"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	StartsAt     time.Time         `json:"startsAt"`
	EndsAt       time.Time         `json:"endsAt"`
	GeneratorURL string            `json:"generatorURL,omitempty"`
}

// Send posts m. A message that is not an alert, which only this version's own outbox could hold, is taken without being
// sent: Alertmanager has no place for it.
func (s *Alertmanager) Send(ctx context.Context, m schema.OutboxMessage) error {
	a, err := schema.DecodeAlert(m.Body)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	before := s.ahead.Load()
	err = s.send(ctx, m, a)
	if moved := time.Duration(s.ahead.Load() - before); moved.Abs() > time.Minute {
		err = s.send(ctx, m, a) // its times were by a clock that Alertmanager does not have
	}
	return err
}

// answered notes Alertmanager's clock.
func (s *Alertmanager) answered(h http.Header) {
	if theirs, err := http.ParseTime(h.Get("Date")); err == nil {
		s.ahead.Store(int64(theirs.Sub(s.now())))
	}
}

func (s *Alertmanager) send(ctx context.Context, m schema.OutboxMessage, a schema.Alert) error {
	now := s.now().UTC().Add(time.Duration(s.ahead.Load())) // by Alertmanager's clock
	p := postable{
		Labels: map[string]string{
			"alertname": "DecuwatchUncertainty", "model": a.Model,
			"severity": string(a.Severity), "reason": string(a.Reason), "kind": string(a.Kind),
		},
		Annotations: map[string]string{
			"summary":  Summary(a),
			"alert_id": a.ID,
		},
		StartsAt: a.FiredAt.UTC(),
		// From now on, not from when it fired: one that waited in the outbox must be active when it arrives.
		EndsAt: now.Add(s.cfg.ResolveAfter),
	}
	if p.StartsAt.After(now) {
		p.StartsAt = now
	}
	set := func(m map[string]string, name, value string) {
		if value != "" {
			m[name] = value
		}
	}
	set(p.Labels, "class", a.ClassLabel)
	if a.ClassIndex >= 0 {
		p.Labels["class_index"] = strconv.Itoa(a.ClassIndex)
	}
	set(p.Labels, "measurement", string(a.Measurement))
	for name, value := range s.cfg.Labels {
		p.Labels[name] = value
	}
	set(p.Annotations, "event_source", a.Source)
	set(p.Annotations, "event_id", a.EventID)
	if a.Measurement != "" {
		p.Annotations["value"] = strconv.FormatFloat(a.Decided, 'g', 6, 64)
		p.Annotations["threshold"] = strconv.FormatFloat(a.Threshold, 'g', 6, 64)
	}
	if s.cfg.Link != "" {
		p.GeneratorURL = s.cfg.Link + url.PathEscape(a.ID)
	}
	body, err := json.Marshal([]postable{p})
	if err != nil {
		return fmt.Errorf("post alert %s: %w", m.AlertID, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimRight(s.cfg.URL, "/")+"/api/v2/alerts",
		bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("post alert %s: %w", m.AlertID, err)
	}
	req.Header.Set("Content-Type", "application/json")
	return post(s.client, req, m.AlertID, s.answered)
}
