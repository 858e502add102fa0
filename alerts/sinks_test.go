package alerts_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
)

// message is the outbox's message of an alert whose labels are as hostile as they come.
func message(t *testing.T) (schema.Alert, schema.OutboxMessage) {
	t.Helper()
	s := score(.5, .6)
	s.ClassLabel = "<!channel> & co"
	a := alerts.Decide(s, table(t, threshold(1, "class", 3, schema.ClassGap, "critical", .125))).Alerts[0]
	header, body, err := schema.EncodeAlert(a)
	if err != nil {
		t.Fatal(err)
	}
	return a, schema.OutboxMessage{ID: 1, AlertID: a.ID, Subject: schema.AlertSubject(a), Header: header, Body: body}
}

// received is one request that a receiver got.
type received struct {
	path   string
	header http.Header
	body   []byte
}

// receiver answers each request with the next of the given answers, the last again and again.
func receiver(t *testing.T, answers ...func(http.ResponseWriter)) (string, <-chan received) {
	t.Helper()
	got := make(chan received, 16)
	n := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		if r.Method != http.MethodPost {
			t.Errorf("method is %s", r.Method)
		}
		got <- received{r.URL.Path, r.Header, body}
		if len(answers) > 0 {
			answers[min(n, len(answers)-1)](w)
			n++
		}
	}))
	t.Cleanup(srv.Close)
	return srv.URL, got
}

func TestWebhookIsSigned(t *testing.T) {
	key := []byte("0123456789abcdef0123456789abcdef")
	url, got := receiver(t)
	w, err := alerts.NewWebhook(alerts.WebhookConfig{URL: url + "/hook",
		Secret: "whsec_" + base64.StdEncoding.EncodeToString(key)})
	if err != nil {
		t.Fatal(err)
	}
	a, m := message(t)
	before := time.Now().Unix()
	if err := w.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	r := <-got
	if r.path != "/hook" || r.header.Get("Content-Type") != "application/cloudevents+json" ||
		string(r.body) != string(m.Body) {
		t.Errorf("received %s, %v: %s", r.path, r.header, r.body)
	}
	// The signature as the specification gives it, without the library.
	stamp := r.header.Get("Webhook-Timestamp")
	if at, err := strconv.ParseInt(stamp, 10, 64); err != nil || at < before || at > time.Now().Unix() {
		t.Errorf("timestamp is %q", stamp)
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", a.ID, stamp, r.body)
	want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
	if r.header.Get("Webhook-Signature") != want || r.header.Get("Webhook-Id") != a.ID {
		t.Errorf("id %q, signature %q; want %q, %q", r.header.Get("Webhook-Id"), r.header.Get("Webhook-Signature"), a.ID,
			want)
	}
	decoded, err := schema.DecodeAlert(r.body)
	if err != nil || decoded.ID != a.ID || decoded.Severity != "critical" {
		t.Errorf("alert is %+v, %v", decoded, err)
	}
}

func TestWebhookForSlack(t *testing.T) {
	url, got := receiver(t)
	w, err := alerts.NewWebhook(alerts.WebhookConfig{Name: "slack", URL: url, Format: alerts.FormatSlack,
		Link: "https://review.example.com/alerts/"})
	if err != nil {
		t.Fatal(err)
	}
	a, m := message(t)
	if err := w.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	r := <-got
	var body map[string]string
	if err := json.Unmarshal(r.body, &body); err != nil {
		t.Fatal(err)
	}
	want := "CRITICAL: fashion-mnist, class &lt;!channel&gt; &amp; co: class_gap 0.5 is at or above 0.125 " +
		"(class_threshold) https://review.example.com/alerts/" + a.ID
	if body["text"] != want || len(body) != 1 || w.Name() != "slack" {
		t.Errorf("body is %q, want text %q", body, want)
	}
	if r.header.Get("Webhook-Signature") != "" {
		t.Error("signed without a secret")
	}
}

// A posted CloudEvent has the link to the review, is signed with it, and is the same alert otherwise. What is not an
// alert stays as it is.
func TestWebhookHasTheLink(t *testing.T) {
	key := []byte("0123456789abcdef0123456789abcdef")
	url, got := receiver(t)
	w, err := alerts.NewWebhook(alerts.WebhookConfig{URL: url, Link: "https://review.example.com/review/",
		Secret: "whsec_" + base64.StdEncoding.EncodeToString(key)})
	if err != nil {
		t.Fatal(err)
	}
	a, m := message(t)
	if err := w.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	r := <-got
	var posted, stored struct{ Data map[string]any }
	if err := errors.Join(json.Unmarshal(r.body, &posted), json.Unmarshal(m.Body, &stored)); err != nil {
		t.Fatal(err)
	}
	if link := posted.Data["link"]; link != "https://review.example.com/review/"+a.ID {
		t.Errorf("the link is %v", link)
	}
	delete(posted.Data, "link")
	if !reflect.DeepEqual(posted, stored) {
		t.Errorf("posted %v, want %v", posted, stored)
	}
	verifier, err := standardwebhooks.NewWebhookRaw(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := verifier.Verify(r.body, r.header); err != nil {
		t.Error(err)
	}
	m.Body = []byte(`{"type": "another", "data": {}}`)
	if err := w.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if r := <-got; string(r.body) != string(m.Body) {
		t.Errorf("another message is posted as %s", r.body)
	}
}

// Only 2xx takes an alert; the error says what was answered, and when to come back.
func TestWebhookRejected(t *testing.T) {
	status := func(code int) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			w.Header().Set("Retry-After", "120")
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(code)
			_, _ = io.WriteString(w, "not now")
		}
	}
	url, got := receiver(t, status(500), status(429), status(302), status(204))
	w, err := alerts.NewWebhook(alerts.WebhookConfig{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	_, m := message(t)
	for _, code := range []string{"500", "429", "302"} {
		err := w.Send(t.Context(), m)
		<-got
		var after interface{ RetryAfter() time.Duration }
		if err == nil || !strings.Contains(err.Error(), code) || !strings.Contains(err.Error(), "not now") {
			t.Errorf("error is %v, want one with %s", err, code)
		} else if !errors.As(err, &after) || after.RetryAfter() != 2*time.Minute {
			t.Errorf("error %v does not say when to come back", err)
		}
	}
	if err := w.Send(t.Context(), m); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.Send(ctx, m); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), url) {
		t.Errorf("error is %v, want the context's, without the URL", err)
	}
}

func TestSinkConfigErrors(t *testing.T) {
	good := base64.StdEncoding.EncodeToString(make([]byte, 24))
	for _, c := range []struct {
		names string
		cfg   alerts.WebhookConfig
	}{
		{"URL", alerts.WebhookConfig{}},
		{"URL", alerts.WebhookConfig{URL: "ftp://example.com"}},
		{"URL", alerts.WebhookConfig{URL: "https:///path"}},
		{"URL", alerts.WebhookConfig{URL: "http://[::1"}},
		{"Format", alerts.WebhookConfig{URL: "http://example.com", Format: "xml"}},
		{"Secret", alerts.WebhookConfig{URL: "http://example.com", Secret: "???"}},
		{"Secret", alerts.WebhookConfig{URL: "http://example.com",
			Secret: base64.StdEncoding.EncodeToString(make([]byte, 23))}},
	} {
		if _, err := alerts.NewWebhook(c.cfg); err == nil || !strings.Contains(err.Error(), c.names) || c.cfg.Secret != "" &&
			strings.Contains(err.Error(), c.cfg.Secret) {
			t.Errorf("%+v: error is %v, want one that names %s and no secret", c.cfg, err, c.names)
		}
	}
	if _, err := alerts.NewWebhook(alerts.WebhookConfig{URL: "https://example.com", Secret: good}); err != nil {
		t.Error(err)
	}
	if _, err := alerts.NewAlertmanager(alerts.AlertmanagerConfig{URL: "example.com"}); err == nil {
		t.Error("an Alertmanager without a scheme was accepted")
	}
	if _, err := alerts.NewAlertmanager(alerts.AlertmanagerConfig{URL: "http://example.com",
		ResolveAfter: -1}); err == nil {
		t.Error("a negative time was accepted")
	}
}

func TestAlertmanager(t *testing.T) {
	url, got := receiver(t, func(http.ResponseWriter) {},
		func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadRequest) })
	s, err := alerts.NewAlertmanager(alerts.AlertmanagerConfig{URL: url + "/",
		Labels: map[string]string{"team": "safety"}, ResolveAfter: time.Hour, Link: "https://review.example.com/alerts/"})
	if err != nil {
		t.Fatal(err)
	}
	a, m := message(t)
	before := time.Now()
	if err := s.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	r := <-got
	if r.path != "/api/v2/alerts" || r.header.Get("Content-Type") != "application/json" {
		t.Errorf("posted to %s as %s", r.path, r.header.Get("Content-Type"))
	}
	var list []struct {
		Labels, Annotations map[string]string
		StartsAt, EndsAt    time.Time
		GeneratorURL        string
	}
	if err := json.Unmarshal(r.body, &list); err != nil || len(list) != 1 {
		t.Fatalf("body is %s: %v", r.body, err)
	}
	p := list[0]
	want := map[string]string{
		"alertname": "DecuwatchUncertainty", "model": "fashion-mnist", "class": "<!channel> & co", "class_index": "3",
		"measurement": "class_gap",
		"severity":    "critical", "reason": "class_threshold", "kind": "score", "team": "safety",
	}
	if fmt.Sprint(p.Labels) != fmt.Sprint(want) {
		t.Errorf("labels are %v, want %v", p.Labels, want)
	}
	if p.Annotations["alert_id"] != a.ID || p.Annotations["event_id"] != "r-17" || p.Annotations["value"] != "0.5" ||
		p.Annotations["threshold"] != "0.125" {
		t.Errorf("annotations are %v", p.Annotations)
	}
	if !p.StartsAt.Equal(a.FiredAt) || p.EndsAt.Before(before.Add(time.Hour)) ||
		p.GeneratorURL != "https://review.example.com/alerts/"+a.ID {
		t.Errorf("starts %s, ends %s, from %s", p.StartsAt, p.EndsAt, p.GeneratorURL)
	}
	if err := s.Send(t.Context(), m); err == nil || !strings.Contains(err.Error(), "400") {
		t.Errorf("error is %v, want one with 400", err)
	}
}
