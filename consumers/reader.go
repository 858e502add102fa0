package consumers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// message is one delivery of a stored message.
type message struct {
	Stored
	acknowledger
	stream    string
	delivered int // 1 for the first delivery
}

// delivery returns the identity of the delivery.
func (m *message) delivery() schema.Delivery {
	return schema.Delivery{
		Stream: m.stream, Sequence: m.Sequence, Time: m.Time.UTC(), Delivered: m.delivered, Digest: m.Digest(),
	}
}

// acknowledger tells the server what becomes of one delivery.
type acknowledger interface {
	progress() error                     // it is still being worked on: AckWait begins again
	doubleAck(ctx context.Context) error // it is done; nil as soon as the server has it
	nak(delay time.Duration) error       // deliver it again, after delay
	term(reason string) error            // never deliver it again
}

// source delivers the messages of one loop.
type source interface {
	// pull requests n messages and calls take with each, until n came, the request expired, or ctx ended. Messages that
	// are on their way when ctx ends are still taken. Otherwise the server would wait for AckWait before it delivered them
	// again.
	pull(ctx context.Context, n int, take func(*message)) error
}

// puller pulls from a durable consumer through a core NATS subscription.
//
// The readers of package jetstream recognize a status of the server by its headers, but a producer controls the headers
// of a message. The puller looks at the reply subject instead, which starts with $JS.ACK. for stored messages only.
type puller struct {
	nc       *nats.Conn
	stream   string
	consumer string
	expiry   time.Duration // of one request
	log      *slog.Logger
}

const (
	ackPrefix    = "$JS.ACK."
	statusSpare  = 64          // room for status messages beside the messages
	drainTimeout = time.Second // for the server's answer that no more messages are on their way
)

func (p *puller) pull(ctx context.Context, n int, take func(*message)) error {
	arrived := make(chan *nats.Msg, n+statusSpare)
	sub, err := p.nc.ChanSubscribe(p.nc.NewInbox(), arrived)
	if err != nil {
		return fmt.Errorf("pull from %s: %w", p.consumer, err)
	}
	heartbeat := p.expiry / 2
	lost := p.nc.StatusChanged(nats.RECONNECTING, nats.CLOSED)
	defer p.nc.RemoveStatusListener(lost)
	request, err := json.Marshal(struct {
		Batch     int           `json:"batch"`
		Expires   time.Duration `json:"expires"`
		Heartbeat time.Duration `json:"idle_heartbeat"`
	}{n, p.expiry, heartbeat})
	if err == nil {
		api := jetstream.DefaultAPIPrefix + "CONSUMER.MSG.NEXT." + p.stream + "." + p.consumer
		err = p.nc.PublishRequest(api, sub.Subject, request)
	}
	silence := time.NewTimer(2*heartbeat + time.Second)
	defer silence.Stop()
	ended := false // by the server
	for err == nil && n > 0 && !ended && ctx.Err() == nil {
		select {
		case msg := <-arrived:
			silence.Reset(2*heartbeat + time.Second)
			if m := p.message(msg); m != nil {
				n--
				take(m)
				continue
			}
			ended, err = status(msg)
		case <-lost:
			err = errors.New("the connection to NATS was lost")
		case <-silence.C:
			err = fmt.Errorf("the server was silent for %s", 2*heartbeat+time.Second)
		case <-ctx.Done():
		}
	}
	if n == 0 || ended {
		err = errors.Join(err, unsubscribe(sub))
	} else {
		err = errors.Join(err, p.drain(sub, arrived, take))
	}
	if err != nil {
		return fmt.Errorf("pull from %s: %w", p.consumer, err)
	}
	return nil
}

// drain ends the request and takes what the server has sent by then.
//
//nolint:contextcheck // it runs after the caller's context has ended
func (p *puller) drain(sub *nats.Subscription, arrived <-chan *nats.Msg, take func(*message)) error {
	err := sub.Drain()
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if p.nc.IsConnected() {
		// The server answers after everything that it sent before. If it does not answer, it delivers later messages again.
		_ = p.nc.FlushWithContext(ctx)
	}
	for {
		select {
		case msg := <-arrived:
			if m := p.message(msg); m != nil {
				take(m)
			}
		default:
			return ignoreClosed(err)
		}
	}
}

// unsubscribe ends sub, if it has not ended.
func unsubscribe(sub *nats.Subscription) error { return ignoreClosed(sub.Unsubscribe()) }

// ignoreClosed drops errors that say that the connection or the subscription has ended already.
func ignoreClosed(err error) error {
	if errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrBadSubscription) ||
		errors.Is(err, nats.ErrConnectionReconnecting) {
		return nil
	}
	return err
}

// message returns the stored message that msg delivers, or nil if msg is a status of the server.
func (p *puller) message(msg *nats.Msg) *message {
	if !strings.HasPrefix(msg.Reply, ackPrefix) {
		return nil
	}
	m, err := parseAck(msg.Reply)
	if err != nil || m.stream != p.stream {
		p.log.Error("unexpected reply subject of a message",
			"consumer", p.consumer, "reply", clean(msg.Reply), "err", err)
		return nil
	}
	m.Subject, m.Header, m.Payload = msg.Subject, msg.Header, msg.Data
	// nats.go passes a message on without headers if it cannot read them.
	m.Unreadable = msg.Header == nil && msg.Size() > len(msg.Subject)+len(msg.Reply)+len(msg.Data)
	m.acknowledger = natsAck{p.nc, msg.Reply}
	return m
}

// parseAck parses the reply subject of a delivery. It has 9 tokens, or at least 11 with domain and account.
func parseAck(reply string) (*message, error) {
	tokens := strings.Split(reply, ".")
	switch {
	case len(tokens) == 9:
		tokens = tokens[2:]
	case len(tokens) >= 11:
		tokens = tokens[4:]
	default:
		return nil, fmt.Errorf("has %d tokens, must have 9, or at least 11", len(tokens))
	}
	delivered, err1 := strconv.Atoi(tokens[2])
	sequence, err2 := strconv.ParseUint(tokens[3], 10, 64)
	stored, err3 := strconv.ParseInt(tokens[5], 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	return &message{
		Stored: Stored{Sequence: sequence, Time: time.Unix(0, stored).UTC()}, stream: tokens[0], delivered: delivered,
	}, nil
}

// status reads a status of the server. Ended says that the request ended as it should; the error says why it failed.
func status(msg *nats.Msg) (ended bool, err error) {
	code, description := msg.Header.Get("Status"), msg.Header.Get("Description")
	switch code {
	case "100": // idle heartbeat
		return false, nil
	case "404", "408": // no messages, expired
		return true, nil
	case "409":
		if strings.EqualFold(description, "Batch Completed") {
			return true, nil
		}
	case "503":
		description = "JetStream does not answer"
	}
	return false, fmt.Errorf("the server ended the request: %s %s", code, description)
}

// natsAck acknowledges by publishing to the delivery's reply subject.
type natsAck struct {
	nc    *nats.Conn
	reply string
}

func (a natsAck) progress() error { return a.nc.Publish(a.reply, []byte("+WPI")) }

func (a natsAck) doubleAck(ctx context.Context) error {
	_, err := a.nc.RequestWithContext(ctx, a.reply, []byte("+ACK"))
	return err
}

func (a natsAck) nak(delay time.Duration) error {
	if delay <= 0 {
		return a.nc.Publish(a.reply, []byte("-NAK"))
	}
	return a.nc.Publish(a.reply, fmt.Appendf(nil, `-NAK {"delay": %d}`, delay.Nanoseconds()))
}

func (a natsAck) term(reason string) error {
	return a.nc.Publish(a.reply, []byte("+TERM "+reason))
}
