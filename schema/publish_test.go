package schema_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// stream makes a stream for generation events on a real server.
func stream(t *testing.T) (jetstream.JetStream, jetstream.Stream, string, context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	server := natstest.Start(t)
	js := server.JetStream()
	st, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "GENERATION",
		Subjects: []string{"generation.requested.>"}})
	if err != nil {
		t.Fatal(err)
	}
	return js, st, server.URL(), ctx
}

func TestPublish(t *testing.T) {
	js, st, _, ctx := stream(t)
	e := schema.Event{
		Source: "//studio/render", ID: "1", Time: time.Now().UTC().Truncate(time.Microsecond),
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassIndex(3), Seed: math.MaxUint64,
			Labels: map[string]string{"tenant": "acme"}},
	}
	ack, err := schema.Publish(ctx, js, e)
	if err != nil || ack.Duplicate || ack.Sequence != 1 {
		t.Fatalf("%+v %v", ack, err)
	}
	if ack, err = schema.Publish(ctx, js, e); err != nil || !ack.Duplicate {
		t.Errorf("published twice: %+v %v", ack, err)
	}
	msg, err := st.GetMsg(ctx, 1)
	if err != nil || msg.Subject != "generation.requested.fashion-mnist" {
		t.Fatalf("%+v %v", msg, err)
	}
	if got, err := schema.Decode(msg.Header, msg.Data); err != nil || !reflect.DeepEqual(got, e) {
		t.Errorf("\n got %+v\nwant %+v (%v)", got, e, err)
	}
	e.Data.Model = "Fashion MNIST"
	var invalid *schema.Invalid
	if _, err := schema.Publish(ctx, js, e); !errors.As(err, &invalid) || invalid.Field != "data.model" {
		t.Errorf("a broken event: %v", err)
	}
	if info, err := st.Info(ctx); err != nil || info.State.Msgs != 1 {
		t.Errorf("%+v %v", info, err)
	}
}

// TestPythonSnippet runs the Python code of docs/events.md as it stands against a real server.
func TestPythonSnippet(t *testing.T) {
	_, st, url, ctx := stream(t)
	text, err := os.ReadFile("../docs/events.md")
	if err != nil {
		t.Fatal(err)
	}
	code := snippet(t, string(text), "## From Python")
	cmd := exec.CommandContext(ctx, "python3", "-c", code)
	cmd.Env = append(os.Environ(), "NATS_URL="+url, "PYTHONPATH="+natstest.Python(t))
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "stored in GENERATION as message 1" {
		t.Fatalf("%v: %s", err, out)
	}
	msg, err := st.GetMsg(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	e, err := schema.Decode(msg.Header, msg.Data)
	if err != nil {
		t.Fatal(err)
	}
	want := schema.Generation{
		Model: "fashion-mnist", Class: schema.ClassLabel("Trouser"), Seed: math.MaxUint64, Noise: "torch-cuda",
		Sampler: &schema.Sampler{Name: "ddim", Steps: 50, GuidanceScale: 7.5},
		Labels:  map[string]string{"tenant": "acme", "region": "eu"},
	}
	if !reflect.DeepEqual(e.Data, want) {
		t.Errorf("\n got %+v\nwant %+v", e.Data, want)
	}
	if got := msg.Header.Get(schema.HeaderMessageID); got != schema.MessageID(e) {
		t.Errorf("Nats-Msg-Id %q, want %q", got, schema.MessageID(e))
	}
}

// snippet returns the first Python code after a heading.
func snippet(t *testing.T, text, heading string) string {
	t.Helper()
	_, section, _ := strings.Cut(text, "\n"+heading+"\n")
	_, code, found := strings.Cut(section, "```python\n")
	code, _, closed := strings.Cut(code, "```\n")
	if !found || !closed {
		t.Fatalf("docs/events.md has no Python code after %s", heading)
	}
	return code
}

// TestPythonLatent stores a latent and publishes its event with the code of docs/events.md.
func TestPythonLatent(t *testing.T) {
	js, st, url, ctx := stream(t)
	if _, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "LATENTS_fashion-mnist"}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../docs/events.md")
	if err != nil {
		t.Fatal(err)
	}
	publishing, _, found := strings.Cut(snippet(t, string(text), "## From Python"), "async def main")
	if !found {
		t.Fatal("the code has no main")
	}
	code := publishing + snippet(t, string(text), "### Your own latent") + `
import struct

async def main():
    nc = await nats.connect(os.environ["NATS_URL"])
    js = nc.jetstream()
    raw = struct.pack("<256e", *(i / 8 for i in range(256)))
    latent = await publish_latent(js, model="fashion-mnist", name="render-7/1", raw=raw, dtype="float16",
                                  shape=[4, 8, 8], step=3, timestep=701)
    await publish_generation(js, source="//studio/render-7", id="1", model="fashion-mnist", class_=3, seed=0,
                             latent=latent, sampler={"name": "ddim", "steps": 10, "guidance_scale": 2, "eta": 0})
    await nc.close()

asyncio.run(main())
`
	cmd := exec.CommandContext(ctx, "python3", "-c", code)
	cmd.Env = append(os.Environ(), "NATS_URL="+url, "PYTHONPATH="+natstest.Python(t))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	msg, err := st.GetMsg(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	e, err := schema.Decode(msg.Header, msg.Data)
	if err != nil {
		t.Fatal(err)
	}
	object, err := schema.ReadObject(ctx, js, *e.Data.Latent)
	if err != nil {
		t.Fatal(err)
	}
	numbers, err := e.Data.Latent.Numbers(object)
	if err != nil || len(numbers) != 512 || e.Data.Latent.Step != 3 || *e.Data.Latent.Timestep != 701 {
		t.Errorf("%d bytes of %+v: %v", len(numbers), e.Data.Latent, err)
	}
}

// TestPythonBinaryMode publishes in binary mode with nats-py: attributes in headers, data alone in the payload.
func TestPythonBinaryMode(t *testing.T) {
	_, st, url, ctx := stream(t)
	const code = `
import asyncio, json, os
from urllib.parse import quote
import nats

async def main():
    nc = await nats.connect(os.environ["NATS_URL"])
    attributes = {
        "specversion": "1.0", "type": "io.decuwatch.generation.requested.v1", "source": "//studio/render-7",
        "id": 'Bild 7 "€" 100%',
        "time": "2026-03-01T12:00:00.25z", "datacontenttype": "application/json", "subject": "a b",
    }
    headers = {"ce-" + name: quote(value, safe="!#$&'()*+,/:;=?@[]") for name, value in attributes.items()}
    data = {"model": "fashion-mnist", "class": "Trouser", "seed": 18446744073709551615}
    await nc.jetstream().publish("generation.requested.fashion-mnist", json.dumps(data).encode(), headers=headers)
    await nc.close()

asyncio.run(main())
`
	cmd := exec.CommandContext(ctx, "python3", "-c", code)
	cmd.Env = append(os.Environ(), "NATS_URL="+url, "PYTHONPATH="+natstest.Python(t))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	msg, err := st.GetMsg(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	want := schema.Event{
		Source: "//studio/render-7", ID: `Bild 7 "€" 100%`, Time: time.Date(2026, 3, 1, 12, 0, 0, 250_000_000,
			time.UTC),
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassLabel("Trouser"), Seed: math.MaxUint64},
	}
	if got, err := schema.Decode(msg.Header, msg.Data); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v (%v)\n%q", got, want, err, msg.Header)
	}
}

func ExamplePublish() {
	nc, err := nats.Connect(nats.DefaultURL)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = schema.Publish(context.Background(), js, schema.Event{
		Source: "//studio/render-7", ID: "01J9Z3V7QK-17", Time: time.Now(),
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassLabel("Trouser"), Seed: 42, Noise: "torch-cuda"},
	})
	var invalid *schema.Invalid
	if errors.As(err, &invalid) {
		fmt.Println("the event breaks the format in", invalid.Field)
	}
}

func ExampleEncode() {
	_, payload, err := schema.Encode(schema.Event{
		Source: "//studio/render-7", ID: "01J9Z3V7QK-17", Time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassIndex(1), Seed: 42},
	})
	fmt.Println(strings.ReplaceAll(string(payload), `,"`, ",\n\""), err)
	_, _, err = schema.Encode(schema.Event{
		Source: "//studio/render-7", ID: "01J9Z3V7QK-17", Time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassIndex(1),
			Sampler: &schema.Sampler{Name: "ddim", Steps: 5000}},
	})
	fmt.Println(err)
	// Output:
	// {"specversion":"1.0",
	// "type":"io.decuwatch.generation.requested.v1",
	// "source":"//studio/render-7",
	// "id":"01J9Z3V7QK-17",
	// "time":"2026-03-01T12:00:00Z",
	// "datacontenttype":"application/json",
	// "data":{"model":"fashion-mnist",
	// "class":1,
	// "seed":42}} <nil>
	// data.sampler.steps: 5000 must be an integer from 1 to 1000
}

func TestDocumentedEventIsValid(t *testing.T) {
	text, err := os.ReadFile("../docs/events.md")
	if err != nil {
		t.Fatal(err)
	}
	_, event, found := strings.Cut(string(text), "```json\n")
	event, _, closed := strings.Cut(event, "```\n")
	if !found || !closed {
		t.Fatal("docs/events.md holds no JSON")
	}
	if _, err := schema.Decode(nil, []byte(event)); err != nil {
		t.Error(err)
	}
}
