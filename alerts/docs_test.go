package alerts_test

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// subscribe hands each critical alert to handle, once, until ctx ends.
func subscribe(ctx context.Context, url string, handle func(schema.Alert) error) error {
	nc, err := nats.Connect(url, nats.MaxReconnects(-1))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	consumer, err := js.CreateOrUpdateConsumer(ctx, "UNCERTAINTY", jetstream.ConsumerConfig{
		Durable:       "safety-review", // resumes after its last alert
		FilterSubject: "uncertainty.alert.*.critical.>",
		AckPolicy:     jetstream.AckExplicitPolicy,
	})
	if err != nil {
		return err
	}
	messages, err := consumer.Messages()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, messages.Stop)()
	seen := map[string]bool{} // in production: a unique key in the table of alerts
	for {
		msg, err := messages.Next()
		if errors.Is(err, jetstream.ErrMsgIteratorClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		alert, err := schema.DecodeAlert(msg.Data())
		if err != nil {
			return err
		}
		if !seen[alert.ID] {
			if err := handle(alert); err != nil {
				return err // the alert was not acknowledged: it is delivered again
			}
			seen[alert.ID] = true
		}
		if err := msg.DoubleAck(ctx); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// blocks returns the code blocks of a language in docs/alerts.md.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join("..", "docs", "alerts.md"))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for i, part := range strings.Split(string(doc), "\n```") {
		if code, ok := strings.CutPrefix(part, language+"\n"); ok && i%2 == 1 {
			found = append(found, code+"\n")
		}
	}
	return found
}

// The program for Go in the documentation is the one that is tested here.
func TestDocumentedGo(t *testing.T) {
	source, err := os.ReadFile("docs_test.go")
	if err != nil {
		t.Fatal(err)
	}
	code := blocks(t, "go")
	if len(code) != 1 || !strings.Contains(string(source), code[0]) {
		t.Errorf("docs/alerts.md does not hold the function subscribe of this file; its blocks are %q", code)
	}
	s, want := published(t)
	ctx, cancel := context.WithCancel(t.Context())
	var got []string
	if err := subscribe(ctx, s.URL(), func(a schema.Alert) error {
		if got = append(got, a.ID); len(got) == len(want) {
			cancel()
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("received %v, want %v", got, want)
	}
}

// published starts a server whose stream holds alerts: critical ones, whose ids it returns, one of them twice, and a
// warning between.
func published(t *testing.T) (*natstest.Server, []string) {
	t.Helper()
	s := natstest.Start(t)
	js := s.JetStream()
	sink := alerts.NewStreamSink(js, alerts.StreamConfig{})
	if err := sink.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for i, severity := range []schema.Severity{"critical", "warn", "critical"} {
		sc := score(.5, 0)
		sc.Event.ID = fmt.Sprint("r-", i)
		a := alerts.Decide(sc, table(t, threshold(1, "class", 3, schema.ClassGap, severity, .1))).Alerts[0]
		header, body, err := schema.EncodeAlert(a)
		if err != nil {
			t.Fatal(err)
		}
		m := schema.OutboxMessage{AlertID: a.ID, Subject: schema.AlertSubject(a), Header: header, Body: body}
		if err := sink.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if severity == "critical" {
			ids = append(ids, a.ID)
			// As if published again beyond the duplicate window.
			if _, err := js.Publish(t.Context(), m.Subject, m.Body); err != nil {
				t.Fatal(err)
			}
		}
	}
	return s, ids
}

func TestDocumentedPythonSubscriber(t *testing.T) {
	code := blocks(t, "python")
	if len(code) != 2 {
		t.Fatalf("docs/alerts.md holds %d Python programs, want 2", len(code))
	}
	s, want := published(t)
	cmd := exec.CommandContext(t.Context(), "python3", "-c", code[0])
	cmd.Env = append(os.Environ(), "PYTHONPATH="+natstest.Python(t), "NATS_URL="+s.URL())
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for _, id := range want {
		if !lines.Scan() {
			t.Fatalf("the program ended early: %v", lines.Err())
		}
		if line := id + " critical Dress class_gap 0.5 0.1"; lines.Text() != line {
			t.Errorf("printed %q, want %q", lines.Text(), line)
		}
	}
	// All four critical messages are acknowledged, the repeated ones without another line.
	js := s.JetStream()
	natstest.Until(t, "each message is acknowledged", func() bool {
		c, err := js.Consumer(t.Context(), "UNCERTAINTY", "safety-review-python")
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if lines.Scan() {
		t.Errorf("printed another line: %q", lines.Text())
	}
	_ = cmd.Wait() // it was killed
}

func TestDocumentedPythonVerification(t *testing.T) {
	secret := "whsec_" + base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef"))
	url, got := receiver(t)
	w, err := alerts.NewWebhook(alerts.WebhookConfig{URL: url, Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	_, m := message(t)
	if err := w.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	r := <-got
	program := blocks(t, "python")[1] + `
import sys

secret, body = sys.argv[1], sys.stdin.buffer.read()
headers = dict(zip(("webhook-id", "webhook-timestamp", "webhook-signature"), sys.argv[2:5]))
old = str(int(headers["webhook-timestamp"]) - 1000)
print(verify(secret, headers, body), verify(secret, headers, body + b" "),
    verify(secret, headers | {"webhook-id": "x"}, body),
      verify(secret, headers | {"webhook-timestamp": old}, body), verify("whsec_" + "A" * 44, headers, body))
`
	cmd := exec.CommandContext(t.Context(), "python3", "-c", program, secret, r.header.Get("Webhook-Id"),
		r.header.Get("Webhook-Timestamp"), r.header.Get("Webhook-Signature"))
	cmd.Stdin = strings.NewReader(string(r.body))
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "True False False False False\n" {
		t.Errorf("printed %q, %v; want that only the message itself is verified", out, err)
	}
}
