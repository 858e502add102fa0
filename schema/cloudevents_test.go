package schema_test

import (
	"context"
	"encoding/json"
	"io"
	"net/url"
	"reflect"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/binding/spec"
	cloudevents "github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"

	"github.com/decuwatch/decuwatch/schema"
)

// natsMessage is a message into which the library writes an event in binary mode, as its NATS protocol does.
type natsMessage struct {
	header map[string][]string
	data   []byte
}

func (m *natsMessage) Start(context.Context) error { return nil }
func (m *natsMessage) End(context.Context) error   { return nil }
func (m *natsMessage) SetData(data io.Reader) (err error) {
	m.data, err = io.ReadAll(data)
	return err
}

func (m *natsMessage) SetAttribute(a spec.Attribute, value any) error {
	return m.SetExtension(a.Name(), value)
}

func (m *natsMessage) SetExtension(name string, value any) error {
	if value == nil {
		return nil
	}
	text, err := types.Format(value)
	m.header["ce-"+name] = []string{url.PathEscape(text)}
	return err
}

// TestCloudEventsSDK holds both directions against the CloudEvents project's own library.
func TestCloudEventsSDK(t *testing.T) {
	want := schema.Event{
		Source: "//studio/render-7", ID: "01J9Z3V7QK-17", Time: time.Date(2026, 3, 1, 12, 0, 0, 250_000_000, time.UTC),
		TraceParent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassLabel("Trouser"), Seed: 42,
			Labels: map[string]string{"tenant": "acme"}},
	}
	theirs := cloudevents.New(cloudevents.CloudEventsVersionV1)
	theirs.SetType(schema.TypeGenerationRequested)
	theirs.SetSource(want.Source)
	theirs.SetID(want.ID)
	theirs.SetTime(want.Time)
	theirs.SetExtension("traceparent", want.TraceParent)
	theirs.SetExtension("partitionkey", "acme")
	if err := theirs.SetData(cloudevents.ApplicationJSON, want.Data); err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(theirs)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := schema.Decode(nil, payload); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("their event here:\n got %+v\nwant %+v (%v)", got, want, err)
	}

	// In binary mode.
	theirs.SetSubject("100% of \"Bücher\"")
	message := &natsMessage{header: map[string][]string{}}
	if _, err := binding.Write(binding.WithForceBinary(t.Context()), binding.ToMessage(&theirs), nil,
		message); err != nil {
		t.Fatal(err)
	}
	if got, err := schema.Decode(message.header, message.data); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("their event here, in binary mode:\n got %+v\nwant %+v (%v)\n%v", got, want, err, message.header)
	}

	_, payload, err = schema.Encode(want)
	if err != nil {
		t.Fatal(err)
	}
	var back cloudevents.Event
	if err := json.Unmarshal(payload, &back); err != nil {
		t.Fatal(err)
	}
	if err := back.Validate(); err != nil {
		t.Error(err)
	}
	var data schema.Generation
	if err := back.DataAs(&data); err != nil || !reflect.DeepEqual(data, want.Data) || back.ID() != want.ID ||
		!back.Time().Equal(want.Time) {
		t.Errorf("our event there: %v (%v)", back, err)
	}

	_, payload, err = schema.EncodeAlert(schema.Alert{ID: "a1", Model: "fashion-mnist", EventID: "e1", FiredAt: want.Time})
	if err != nil {
		t.Fatal(err)
	}
	var alert cloudevents.Event
	if err := json.Unmarshal(payload, &alert); err != nil {
		t.Fatal(err)
	}
	if err := alert.Validate(); err != nil || alert.Type() != schema.TypeUncertaintyAlert || alert.ID() != "a1" {
		t.Errorf("our alert there: %v (%v)", alert, err)
	}
	// An alert about no single event has no subject, which must not be empty in CloudEvents.
	_, payload, err = schema.EncodeAlert(schema.Alert{ID: "a2", Model: "fashion-mnist", FiredAt: want.Time})
	if err != nil {
		t.Fatal(err)
	}
	var summary cloudevents.Event
	if err := json.Unmarshal(payload, &summary); err != nil {
		t.Fatal(err)
	}
	if err := summary.Validate(); err != nil {
		t.Error(err)
	}
}
