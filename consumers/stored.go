package consumers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// Stored is one message of a stream, as it is read by its sequence number.
type Stored struct {
	Subject  string
	Sequence uint64
	Time     time.Time           // when the stream stored it, by the server's clock
	Header   map[string][]string // nil if there is no header, or if it cannot be read
	Payload  []byte

	Unreadable bool // the message has a header that cannot be read
}

// Digest returns the message's digest, see [schema.Digest]. An unreadable header does not count.
func (s Stored) Digest() string { return schema.Digest(s.Header, s.Payload) }

// ReadStored reads the message with the given sequence number. It fails with [jetstream.ErrMsgNotFound].
//
// It asks the stream's leader and reads the answer as JSON. Readers that deliver the message itself (pull consumers,
// ordered consumers, direct gets) mix the server's status lines with the headers, which a producer controls.
func ReadStored(ctx context.Context, js jetstream.JetStream, stream string, sequence uint64) (Stored, error) {
	return ReadNext(ctx, js, stream, sequence, "")
}

// ReadNext reads the first message from a sequence number on whose subject matches the given one, which may have
// wildcards. Its errors are those of ReadStored.
func ReadNext(
	ctx context.Context, js jetstream.JetStream, stream string, sequence uint64, subject string,
) (Stored, error) {
	request := struct {
		Sequence uint64 `json:"seq"`
		NextFor  string `json:"next_by_subj,omitempty"`
	}{Sequence: sequence, NextFor: subject}
	body, err := json.Marshal(request)
	if err != nil {
		return Stored{}, err
	}
	var found struct {
		answer
		Message *struct {
			Subject  string    `json:"subject"`
			Sequence uint64    `json:"seq"`
			Header   []byte    `json:"hdrs"`
			Data     []byte    `json:"data"`
			Time     time.Time `json:"time"`
		} `json:"message"`
	}
	err = ask(ctx, js, "STREAM.MSG.GET."+stream, body, &found)
	var refusal *jetstream.APIError
	switch {
	case errors.As(err, &refusal) && refusal.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		err = jetstream.ErrMsgNotFound
	case err == nil && found.Message == nil:
		err = jetstream.ErrInvalidJetStreamResponse
	}
	if err != nil {
		return Stored{}, fmt.Errorf("read message %d of %s: %w", sequence, stream, err)
	}
	m := found.Message
	s := Stored{Subject: m.Subject, Sequence: m.Sequence, Time: m.Time, Payload: m.Data}
	if header, err := nats.DecodeHeadersMsg(m.Header); err == nil {
		s.Header = header
	} else {
		s.Unreadable = len(m.Header) > 0
	}
	return s, nil
}
