package consumers

import (
	"fmt"
	"strings"

	"github.com/decuwatch/decuwatch/schema"
)

// Decode reads the event of a message and checks that it came on the subject of its own model. Everything that reads
// messages uses Decode, so that the same rules apply everywhere. Every error is a *schema.Invalid. If only the subject
// is wrong, the event is returned, too.
func (s Stored) Decode() (schema.Event, error) {
	if s.Unreadable {
		return schema.Event{}, &schema.Invalid{Field: "headers",
			Reason: "the message's header block cannot be read, it must be lines of the form name: value"}
	}
	ev, err := schema.DecodeAt(s.Header, s.Payload, s.Time)
	if err != nil {
		return schema.Event{}, err
	}
	if s.Subject != schema.SubjectGeneration(ev.Data.Model) {
		of := strings.TrimPrefix(s.Subject, subjectPrefix)
		reason := fmt.Sprintf("is %s, but the subject is of %s", ev.Data.Model, of)
		return ev, &schema.Invalid{Field: "data.model", Reason: reason}
	}
	return ev, nil
}

// incoming is a message and what could be read of it.
type incoming struct {
	model    string // of the subject
	subject  string
	payload  []byte
	delivery schema.Delivery
	event    *schema.Event // nil if it could not be decoded
	source   string        // of the event's identity, if only that could be read
	id       string
}

// read decodes a message. The error says why its event cannot be handled; what could be read is returned all the same.
func read(s Stored, d schema.Delivery) (incoming, error) {
	in := incoming{
		model: strings.TrimPrefix(s.Subject, subjectPrefix), subject: s.Subject, payload: s.Payload, delivery: d,
	}
	ev, err := s.Decode()
	if ev.ID != "" {
		in.event = &ev
	} else {
		in.source, in.id = schema.Identify(s.Header, s.Payload)
	}
	return in, err
}
