package natstest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// Hostile is a message that a producer may store and that readers may misread.
type Hostile struct {
	Name    string
	Header  string // the header block, byte by byte; "" sends no headers
	Payload []byte
	Valid   bool // it has a valid event nevertheless
}

// HostileMessages returns every hostile header block with several payloads: nothing, a valid event in structured mode,
// binary junk, and the largest that a stream with a limit of 64 KiB takes. Event returns the payload of a valid event
// with the given id.
func HostileMessages(event func(id string) []byte) []Hostile {
	type block struct {
		name, header string
		valid        bool // together with the payload of a valid event
	}
	blocks := []block{
		{"no headers", "", true},
		{"empty block", "NATS/1.0\r\n\r\n", true},
		{"line end alone", "\r\n", false},
		{"line without colon", "NATS/1.0\r\nno colon\r\n\r\n", false},
		{"block without end", "NATS/1.0\r\nA: b", false},
		{"binary block", "\x00\xff\xfe\r\n\r\n", false},
		{"empty name", "NATS/1.0\r\n: x\r\n\r\n", true},
		{"ce- twice", "NATS/1.0\r\nce-id: a\r\nce-id: b\r\n\r\n", false},
		{"place in a stream", "NATS/1.0\r\nNats-Stream: OTHER\r\nNats-Sequence: 1\r\nNats-Subject: other\r\n" +
			"Nats-Time-Stamp: 1970-01-01T00:00:00Z\r\nNats-Num-Pending: 0\r\n\r\n", true},
		{"expected stream", "NATS/1.0\r\nNats-Expected-Stream: GENERATION\r\n\r\n", true},
		{"marker", "NATS/1.0\r\nNats-Marker-Reason: MaxAge\r\n\r\n", true},
		{"stalled consumer", "NATS/1.0\r\nStatus: 100\r\n" +
			"Nats-Consumer-Stalled: $JS.API.STREAM.PURGE.GENERATION\r\nNats-Last-Consumer: 1\r\n\r\n", true},
		{"batch completed", "NATS/1.0\r\nStatus: 409\r\nDescription: Batch Completed\r\nNats-Pending-Messages: 100\r\n\r\n",
			true},
		{"consumer deleted", "NATS/1.0\r\nStatus: 409\r\nDescription: Consumer Deleted\r\n\r\n", true},
	}
	for _, code := range []string{"100", "200", "400", "404", "408", "409", "423", "503"} {
		blocks = append(blocks, block{"status " + code, "NATS/1.0\r\nStatus: " + code + "\r\n\r\n", true},
			block{"inline status " + code, "NATS/1.0 " + code + " x\r\n\r\n", true})
	}
	var list []Hostile
	for i, b := range blocks {
		list = append(list,
			Hostile{b.name + ", empty payload", b.header, nil, false},
			Hostile{b.name + ", event", b.header, event(fmt.Sprint("hostile-", i)), b.valid},
			Hostile{b.name + ", junk", b.header, []byte{0, 0xff, 0xfe, '\r', '\n', 0}, false},
			Hostile{b.name + ", 64 KiB", b.header, bytes.Repeat([]byte("x"), 64<<10-len(b.header)), false})
	}
	return list
}

// PublishRaw stores a message with a header block that client libraries may refuse to send, and returns its sequence
// number.
func (s *Server) PublishRaw(t testing.TB, subject, header string, payload []byte) uint64 {
	t.Helper()
	return s.PublishAllRaw(t, subject, []Hostile{{Header: header, Payload: payload}})[0]
}

// PublishAllRaw is PublishRaw for many messages, in order.
func (s *Server) PublishAllRaw(t testing.TB, subject string, messages []Hostile) []uint64 {
	t.Helper()
	conn, err := net.Dial("tcp", s.Address())
	if err != nil {
		t.Fatalf("natstest: %v", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(deadline)); err != nil {
		t.Fatalf("natstest: %v", err)
	}
	const inbox = "_INBOX.raw"
	r := bufio.NewReader(conn)
	send := func(format string, args ...any) {
		if _, err := fmt.Fprintf(conn, format, args...); err != nil {
			t.Fatalf("natstest: %v", err)
		}
	}
	send("CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true}\r\nSUB %s 1\r\n", inbox)
	sequences := make([]uint64, len(messages))
	for i, m := range messages {
		if m.Header == "" {
			send("PUB %s %s %d\r\n%s\r\n", subject, inbox, len(m.Payload), m.Payload)
		} else {
			send("HPUB %s %s %d %d\r\n%s%s\r\n", subject, inbox, len(m.Header), len(m.Header)+len(m.Payload), m.Header,
				m.Payload)
		}
		for sequences[i] == 0 {
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatalf("natstest: %s: %v", m.Name, err)
			}
			switch {
			case strings.HasPrefix(line, "PING"):
				send("PONG\r\n")
			case strings.HasPrefix(line, "-ERR"):
				t.Fatalf("natstest: %s: the server answered %s", m.Name, line)
			case strings.HasPrefix(line, "{"):
				var ack struct {
					Sequence uint64 `json:"seq"`
				}
				if err := json.Unmarshal([]byte(line), &ack); err != nil || ack.Sequence == 0 {
					t.Fatalf("natstest: %s was not stored: %s", m.Name, line)
				}
				sequences[i] = ack.Sequence
			}
		}
	}
	return sequences
}
