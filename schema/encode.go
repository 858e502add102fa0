package schema

import (
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"time"
)

// HeaderMessageID is the NATS header by which JetStream recognizes duplicates within the stream's duplicate window.
const HeaderMessageID = "Nats-Msg-Id"

// HeaderTraceParent is the NATS header of an alert's message that carries the event's W3C trace context.
const HeaderTraceParent = "traceparent"

// SubjectGeneration returns the subject on which generation events of a model are published.
func SubjectGeneration(model string) string { return "generation.requested." + model }

// AlertSubject returns uncertainty.alert.<model>.<severity>.<class index>; the last token is "all" for an alert
// that concerns no single class (ClassIndex below 0).
func AlertSubject(a Alert) string {
	class := "all"
	if a.ClassIndex >= 0 {
		class = strconv.Itoa(a.ClassIndex)
	}
	return "uncertainty.alert." + a.Model + "." + string(a.Severity) + "." + class
}

// MessageID returns the Nats-Msg-Id of an event: its source, model and id with spaces between. Only an id may hold a
// space, so no other event has the same.
func MessageID(e Event) string { return e.Source + " " + e.Data.Model + " " + e.ID }

// structured is a CloudEvent in structured mode.
type structured struct {
	SpecVersion     string `json:"specversion"`
	Type            string `json:"type"`
	Source          string `json:"source"`
	ID              string `json:"id"`
	Time            string `json:"time"`
	Subject         string `json:"subject,omitempty"`
	DataContentType string `json:"datacontenttype"`
	TraceParent     string `json:"traceparent,omitempty"`
	TraceState      string `json:"tracestate,omitempty"`
	Data            any    `json:"data"`
}

// Encode returns the message of an event in structured mode, ready for SubjectGeneration(e.Data.Model). The error is
// an *Invalid if the event breaks the format or would not arrive as it is, so that a producer learns it before the
// monitor does. Times are cut to microseconds.
func Encode(e Event) (header map[string][]string, payload []byte, err error) {
	payload, err = json.Marshal(structured{
		SpecVersion: "1.0", Type: TypeGenerationRequested, Source: e.Source, ID: e.ID,
		Time: formatTime(e.Time), DataContentType: "application/json",
		TraceParent: e.TraceParent, TraceState: e.TraceState, Data: e.Data,
	})
	if err != nil {
		return nil, nil, invalid("data", "cannot be written as JSON: %s", err)
	}
	header = map[string][]string{
		"Content-Type":  {contentTypeStructured},
		HeaderMessageID: {MessageID(e)},
	}
	got, err := Decode(header, payload)
	if err != nil {
		return nil, nil, err
	}
	if field := difference(e, got); field != "" {
		return nil, nil, invalid(field, "would not arrive as it is: it is not UTF-8, or malformed")
	}
	return header, payload, nil
}

// formatTime writes a time in UTC. The format bounds the year as it is written, so that the hours around 2020 to 2099
// take a zone in which they have one of these years.
func formatTime(t time.Time) string {
	const widest = 24*60*60 - 60 // seconds of the largest offset, 23:59
	t = t.UTC()
	switch t.Year() {
	case 2019:
		t = t.In(time.FixedZone("", widest))
	case 2100:
		t = t.In(time.FixedZone("", -widest))
	}
	return t.Format(time.RFC3339Nano)
}

// difference returns the field in which an encoded event differs from what was decoded from it, or "".
// Numbers cannot differ.
func difference(e, got Event) string {
	switch {
	case e.Source != got.Source:
		return "source"
	case e.ID != got.ID:
		return "id"
	case e.TraceParent != got.TraceParent:
		return "traceparent"
	case e.TraceState != got.TraceState:
		return "tracestate"
	case e.Data.Class.String() != got.Data.Class.String():
		return "data.class"
	case e.Data.Sampler != nil && e.Data.Sampler.Name != got.Data.Sampler.Name:
		return "data.sampler.name"
	case !maps.Equal(e.Data.Labels, got.Data.Labels):
		return "data.labels"
	}
	return ""
}

// EncodeAlert returns the message of an alert, a CloudEvent in structured mode, for the subject AlertSubject(a). The
// alert's id is its id and its Nats-Msg-Id. It fails if the alert holds a number that JSON cannot carry.
func EncodeAlert(a Alert) (header map[string][]string, payload []byte, err error) {
	header, payload, err = encodeData(structured{
		Type: TypeUncertaintyAlert, Source: "/decuwatch/" + a.Model, ID: a.ID, Subject: a.EventID,
		TraceParent: a.TraceParent, Data: a,
	}, a.FiredAt)
	if err == nil && a.TraceParent != "" {
		header[HeaderTraceParent] = []string{a.TraceParent}
	}
	return header, payload, err
}

// DecodeAlert reads an alert from a message that EncodeAlert made, in a subscriber. It ignores unknown fields, so that
// an older subscriber survives a newer monitor. The error is an *Invalid.
func DecodeAlert(payload []byte) (Alert, error) {
	return decodeData[Alert](payload, TypeUncertaintyAlert)
}

// encodeData returns the message of a CloudEvent that decuwatch sends.
func encodeData(e structured, at time.Time) (header map[string][]string, payload []byte, err error) {
	e.SpecVersion, e.DataContentType, e.Time = "1.0", "application/json", at.UTC().Format(time.RFC3339Nano)
	if payload, err = json.Marshal(e); err != nil {
		return nil, nil, fmt.Errorf("encode %s %s: %w", e.Type, e.ID, err)
	}
	return map[string][]string{"Content-Type": {contentTypeStructured}, HeaderMessageID: {e.ID}}, payload, nil
}

// decodeData returns the data of a CloudEvent of the given type.
func decodeData[T any](payload []byte, kind string) (data T, err error) {
	var e struct {
		Type string `json:"type"`
		Data *T     `json:"data"`
	}
	if err := json.Unmarshal(payload, &e); err != nil {
		return data, invalid("payload", "is not a CloudEvent of type %s: %s", kind, err)
	}
	if e.Type != kind {
		return data, invalid("type", "%s must be %s", quote(e.Type), kind)
	}
	if e.Data == nil {
		return data, invalid("data", "is missing")
	}
	return *e.Data, nil
}
