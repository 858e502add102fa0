package deploy

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// connectAs connects to nats-server as one of its users: ca is the file with the certificate of its authority, seed the
// file with the seed of the user's nkey.
func connectAs(url, ca, seed, inboxPrefix string) (*nats.Conn, error) {
	nkey, err := nats.NkeyOptionFromSeed(seed)
	if err != nil {
		return nil, err
	}
	return nats.Connect(url, nats.RootCAs(ca), nkey, nats.CustomInboxPrefix(inboxPrefix), nats.MaxReconnects(-1))
}

// exampleOf returns the first code block of a language in a document whose text holds a word.
func exampleOf(t *testing.T, document, language, word string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "docs", document))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split(string(text), "\n```"+language+"\n")[1:] {
		code, _, closed := strings.Cut(part, "\n```")
		if closed && strings.Contains(code, word) {
			return code + "\n"
		}
	}
	t.Fatalf("docs/%s has no block of %s with %q", document, language, word)
	return ""
}

// client starts a program of the documentation as a user of the shipped nats-server.conf, and returns the lines that it
// prints. It is killed when the test ends.
func client(t *testing.T, url, secrets, user, language, code string) *bufio.Scanner {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var cmd *exec.Cmd
	env := append(os.Environ(), "NATS_URL="+url, "NATS_CA="+filepath.Join(secrets, "nats/ca.pem"),
		"NATS_NKEY="+filepath.Join(secrets, "nats-"+user+".nk"))
	if language == "python" {
		cmd = exec.CommandContext(ctx, "python3", "-c", code)
		env = append(env, "PYTHONPATH="+natstest.Python(t))
	} else {
		modules, err := filepath.Abs("../.tools/javascript")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(modules); err != nil {
			t.Fatal("the NATS client for Node.js is missing: run make deploy-tools")
		}
		cmd = exec.CommandContext(ctx, tool(t, "node", "node/bin/node"), "--input-type=module", "--eval", code)
		cmd.Dir = modules
	}
	cmd.Env, cmd.Stderr = env, os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
	})
	time.AfterFunc(patience, cancel)
	return bufio.NewScanner(out)
}

// TestDocumentedClients runs the programs of docs/events.md and docs/alerts.md as the users of the shipped
// nats-server.conf: the producer publishes events, and the subscriber receives an alert.
func TestDocumentedClients(t *testing.T) {
	keys := secrets(t, "-tls", "localhost")
	s := startNATS(t, keys)
	url := strings.NewReplacer("nats://", "tls://", "127.0.0.1", "localhost").Replace(s.ClientURL())
	ca := filepath.Join(keys, "nats/ca.pem")
	source, err := os.ReadFile("clients_test.go")
	if err != nil {
		t.Fatal(err)
	}
	if code := exampleOf(t, "events.md", "go", "func connectAs("); !strings.Contains(string(source), code) {
		t.Errorf("docs/events.md does not hold the function connectAs of this file: %s", code)
	}
	worker, err := connectAs(url, ca, filepath.Join(keys, "nats-worker.nk"), "_INBOX_worker")
	if err != nil {
		t.Fatal(err)
	}
	defer worker.Close()
	js, err := jetstream.New(worker)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := consumers.EnsureStream(t.Context(), js, consumers.StreamConfig{})
	if err != nil {
		t.Fatal(err)
	}
	sink := alerts.NewStreamSink(js, alerts.StreamConfig{})
	if err := sink.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	testProducers(t, url, keys, stream)
	testSubscribers(t, url, keys, sink)
}

// authenticated returns a Python program that connects as the documentation says for the users of nats-server.conf.
func authenticated(t *testing.T, document, word string) string {
	t.Helper()
	code := exampleOf(t, document, "python", word)
	before, after, found := strings.Cut(code, "await nats.connect(")
	_, after, closed := strings.Cut(after, "\n")
	if !found || !closed {
		t.Fatalf("the program of docs/%s connects in another way", document)
	}
	user := map[string]string{"events.md": "producer", "alerts.md": "subscriber"}[document]
	return strings.ReplaceAll(exampleOf(t, "events.md", "python", "async def connect"), "_INBOX_producer",
		"_INBOX_"+user) + before + "await connect()\n" + after
}

func testProducers(t *testing.T, url, keys string, stream jetstream.Stream) {
	t.Helper()
	sequence := uint64(0)
	for language, code := range map[string]string{
		"python": authenticated(t, "events.md", "async def publish_generation"),
		"js":     exampleOf(t, "events.md", "js", "generation.requested"),
	} {
		sequence++
		lines := client(t, url, keys, "producer", language, code)
		if !lines.Scan() || !strings.HasPrefix(lines.Text(), "stored in GENERATION as message ") {
			t.Fatalf("the producer in %s printed %q, %v", language, lines.Text(), lines.Err())
		}
		msg, err := stream.GetMsg(t.Context(), sequence)
		if err != nil {
			t.Fatal(err)
		}
		e, err := schema.Decode(msg.Header, msg.Data)
		if err != nil || e.Data.Model != "fashion-mnist" || e.Data.Seed < 1<<53 {
			t.Errorf("the producer in %s published %+v, %v", language, e, err)
		}
	}
}

func testSubscribers(t *testing.T, url, keys string, sink *alerts.StreamSink) {
	t.Helper()
	a := schema.Alert{
		ID: strings.Repeat("a", 32), Kind: schema.AlertScore, Source: "/test", EventID: "1", EventTime: time.Now(),
		Model: "fashion-mnist", ClassIndex: 3, ClassLabel: "Dress", Severity: schema.SeverityCritical,
		Reason: schema.ReasonModel, Measurement: schema.ClassGap, Value: .5, Decided: .5, Threshold: .1, ThresholdID: 1,
		ClassGap: .5, FiredAt: time.Now(),
	}
	header, body, err := schema.EncodeAlert(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := sink.Send(t.Context(), schema.OutboxMessage{AlertID: a.ID, Subject: schema.AlertSubject(a), Header: header,
		Body: body}); err != nil {
		t.Fatal(err)
	}
	for language, code := range map[string]string{
		"python": authenticated(t, "alerts.md", "pull_subscribe"),
		"js":     exampleOf(t, "alerts.md", "js", "consumers.get"),
	} {
		lines := client(t, url, keys, "subscriber", language, code)
		if want := a.ID + " critical Dress class_gap 0.5 0.1"; !lines.Scan() || lines.Text() != want {
			t.Errorf("the subscriber in %s printed %q, want %q: %v", language, lines.Text(), want, lines.Err())
		}
	}
}

// TestModuleBeforeItIsPublished builds a program that imports the module as docs/events.md says: by a replace of a
// checkout.
func TestModuleBeforeItIsPublished(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("main.go", `package main

import (
	"fmt"

	"github.com/decuwatch/decuwatch/schema"
)

var publish = schema.Publish

func main() { fmt.Println(publish != nil, schema.SubjectGeneration("fashion-mnist")) }
`)
	steps := strings.ReplaceAll(exampleOf(t, "events.md", "sh", "-replace"), "../decuwatch", root)
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", steps+"\ngo run .")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "true generation.requested.fashion-mnist") {
		t.Errorf("%v: %s", err, out)
	}
}
