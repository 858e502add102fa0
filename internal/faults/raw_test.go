package faults

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// publishRaw publishes a message with the given header block, as bytes on the wire, and returns its sequence number.
func publishRaw(address, subject, header string, payload []byte) (uint64, error) {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return 0, err
	}
	const inbox = "_INBOX.raw"
	const connect = `CONNECT {"verbose":false,"headers":true,"no_responders":true}`
	_, err = fmt.Fprintf(conn, connect+"\r\nSUB %s 1\r\nHPUB %s %s %d %d\r\n%s%s\r\n",
		inbox, subject, inbox, len(header), len(header)+len(payload), header, payload)
	if err != nil {
		return 0, err
	}
	in := bufio.NewReader(conn)
	for {
		var f frame
		raw, err := readNATS(in, &f, false)
		if err != nil {
			return 0, err
		}
		switch {
		case strings.HasPrefix(string(raw), "-ERR"):
			return 0, fmt.Errorf("the server says %q", raw)
		case f.kind != "MSG":
			continue
		}
		var ack struct {
			Error *jetstream.APIError `json:"error"`
			jetstream.PubAck
		}
		if err := json.Unmarshal(f.body, &ack); err != nil {
			return 0, err
		}
		if ack.Error != nil {
			return 0, ack.Error
		}
		return ack.Sequence, nil
	}
}
