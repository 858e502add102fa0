package alerts

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/decuwatch/decuwatch/schema"
)

// Formats of a webhook's body.
const (
	FormatCloudEvents = "cloudevents" // the alert as it stands on NATS
	FormatSlack       = "slack"       // {"text": one line}, which Slack, Mattermost and many others read
)

// WebhookConfig is the configuration of a [Webhook].
type WebhookConfig struct {
	Name schema.Sink // of the sink. Defaults to webhook
	URL  string      // http or https
	// key of the signature, base64, at least 24 bytes, with or without the prefix whsec_. "" does not sign
	Secret string
	Format string // FormatCloudEvents or FormatSlack; "" is the first
	Link   string // prefix of the link to an alert, its id follows; "" makes no link
	Client *http.Client
}

// Webhook posts each message to a URL, signed by HMAC-SHA256 as the Standard Webhooks specification says: the headers
// webhook-id (the alert's id), webhook-timestamp (Unix seconds) and webhook-signature ("v1," and the base64 of the HMAC
// of "id.timestamp.body"). A status of 2xx takes the message; anything else is tried again. Redirects are not followed.
type Webhook struct {
	cfg    WebhookConfig
	signer *standardwebhooks.Webhook // nil does not sign
	client *http.Client
	now    func() time.Time
}

// NewWebhook returns the sink. The error names the field that is wrong.
func NewWebhook(cfg WebhookConfig) (*Webhook, error) {
	cfg.Name = cmp.Or(cfg.Name, schema.SinkWebhook)
	if err := checkURL(cfg.URL); err != nil {
		return nil, fmt.Errorf("alerts: webhook %s: URL: %w", cfg.Name, err)
	}
	if cfg.Format != "" && cfg.Format != FormatCloudEvents && cfg.Format != FormatSlack {
		return nil, fmt.Errorf("alerts: webhook %s: Format %q is not %s or %s", cfg.Name, cfg.Format, FormatCloudEvents,
			FormatSlack)
	}
	w := &Webhook{cfg: cfg, client: client(cfg.Client), now: time.Now}
	if cfg.Secret != "" {
		signer, err := standardwebhooks.NewWebhook(cfg.Secret)
		if err != nil {
			return nil, fmt.Errorf("alerts: webhook %s: Secret is not base64", cfg.Name) // the error would repeat it
		}
		if secret := strings.TrimRight(strings.TrimPrefix(cfg.Secret, "whsec_"), "="); len(secret)*3/4 < 24 {
			return nil, fmt.Errorf("alerts: webhook %s: Secret has fewer than 24 bytes", cfg.Name)
		}
		w.signer = signer
	}
	return w, nil
}

// Name returns the name of the configuration.
func (w *Webhook) Name() schema.Sink { return w.cfg.Name }

// Send posts m.
func (w *Webhook) Send(ctx context.Context, m schema.OutboxMessage) error {
	body, contentType := m.Body, "application/json"
	for name, values := range m.Header {
		if strings.EqualFold(name, "Content-Type") && len(values) == 1 {
			contentType = values[0]
		}
	}
	if w.cfg.Format == FormatSlack {
		var err error
		if body, err = w.line(m); err != nil {
			return err
		}
		contentType = "application/json"
	} else if w.cfg.Link != "" {
		body = w.linked(m)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.cfg.URL, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("post alert %s: %w", m.AlertID, err)
	}
	req.Header.Set("Content-Type", contentType)
	now := w.now()
	req.Header.Set(standardwebhooks.HeaderWebhookID, m.AlertID)
	req.Header.Set(standardwebhooks.HeaderWebhookTimestamp, strconv.FormatInt(now.Unix(), 10))
	if w.signer != nil {
		signature, err := w.signer.Sign(m.AlertID, now, body)
		if err != nil {
			return fmt.Errorf("sign alert %s: %w", m.AlertID, err)
		}
		req.Header.Set(standardwebhooks.HeaderWebhookSignature, signature)
	}
	return post(w.client, req, m.AlertID, nil)
}

// line is the body of the format slack.
func (w *Webhook) line(m schema.OutboxMessage) ([]byte, error) {
	text := m.Subject + " " + m.AlertID // of a message that is not an alert
	if a, err := schema.DecodeAlert(m.Body); err == nil {
		text = Summary(a)
		if w.cfg.Link != "" {
			text += " " + w.cfg.Link + url.PathEscape(a.ID)
		}
	}
	return json.Marshal(map[string]string{"text": escapeSlack.Replace(text)})
}

// linked returns the CloudEvent of an alert with the link to its review. Another message stays as it is.
func (w *Webhook) linked(m schema.OutboxMessage) []byte {
	a, err := schema.DecodeAlert(m.Body)
	if err != nil {
		return m.Body
	}
	var event, data map[string]json.RawMessage
	if json.Unmarshal(m.Body, &event) != nil || json.Unmarshal(event["data"], &data) != nil {
		return m.Body
	}
	link, err := json.Marshal(w.cfg.Link + url.PathEscape(a.ID))
	if err != nil {
		return m.Body
	}
	data["link"] = link
	if event["data"], err = json.Marshal(data); err != nil {
		return m.Body
	}
	body, err := json.Marshal(event)
	if err != nil {
		return m.Body
	}
	return body
}

// escapeSlack keeps labels, which come from outside, from being read as mentions and links.
var escapeSlack = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")

// Summary returns an alert in one line.
func Summary(a schema.Alert) string {
	s := fmt.Sprintf("%s: %s", strings.ToUpper(string(a.Severity)), a.Model)
	if a.ClassLabel != "" {
		s += fmt.Sprintf(", class %s", a.ClassLabel)
	}
	if a.Measurement != "" {
		s += fmt.Sprintf(": %s %.4g is at or above %.4g", a.Measurement, a.Decided, a.Threshold)
	}
	return s + fmt.Sprintf(" (%s)", a.Reason)
}

// checkURL returns an error unless address is an absolute http or https URL.
func checkURL(address string) error {
	u, err := url.Parse(address)
	switch {
	case err != nil:
		return errors.New("is not a URL")
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return errors.New("must start with http:// or https:// and name a host")
	}
	return nil
}

// client returns c, or a client of its own, that does not follow redirects: a receiver that moved must be configured.
func client(c *http.Client) *http.Client {
	if c == nil {
		c = &http.Client{}
	}
	own := *c
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &own
}

// rejected is the error of a receiver that answered with another status than 2xx.
type rejected struct {
	status int
	text   string
	after  time.Duration
}

func (r *rejected) Error() string {
	return fmt.Sprintf("the receiver answered %d %s: %s", r.status, http.StatusText(r.status), r.text)
}

// RetryAfter is how long the receiver asked to wait; 0 if it did not ask.
func (r *rejected) RetryAfter() time.Duration { return r.after }

// post sends req and returns nil if the answer is 2xx. Answered is called with the header of an answer; it may be nil.
func post(c *http.Client, req *http.Request, id string, answered func(http.Header)) error {
	resp, err := c.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the URL, which may hold a secret
		}
		return fmt.Errorf("post alert %s: %w", id, err)
	}
	defer resp.Body.Close()
	if answered != nil {
		answered(resp.Header)
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 200)) // as much as there is; the status decides
	if resp.StatusCode/100 == 2 {
		return nil
	}
	r := &rejected{status: resp.StatusCode, text: strings.TrimSpace(string(text))}
	r.after = retryAfter(resp.Header, time.Now())
	return fmt.Errorf("post alert %s: %w", id, r)
}

// retryAfter reads Retry-After, which is a number of seconds or a time by the receiver's clock. It returns 0 if there
// is no such header, or not one alone, and at most maxRetryAfter.
func retryAfter(h http.Header, now time.Time) time.Duration {
	values := h.Values("Retry-After")
	if len(values) != 1 {
		return 0
	}
	text := strings.TrimSpace(values[0])
	if text != "" && strings.Trim(text, "0123456789") == "" {
		seconds, err := strconv.ParseUint(text, 10, 64)
		if err != nil || seconds > uint64(maxRetryAfter/time.Second) {
			return maxRetryAfter
		}
		return time.Duration(seconds) * time.Second //nolint:gosec // bounded above
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0
	}
	if sent, err := http.ParseTime(h.Get("Date")); err == nil { // the same clock
		now = sent
	}
	return min(max(0, at.Sub(now)), maxRetryAfter)
}
