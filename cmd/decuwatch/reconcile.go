package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type reconcileCmd struct {
	JSON     bool           `name:"json" help:"Print the counts as JSON."`
	NATS     NATSConfig     `embed:"" prefix:"nats." group:"NATS"`
	Stream   StreamConfig   `embed:"" prefix:"stream." group:"Stream of events"`
	Alerts   AlertsConfig   `embed:"" prefix:"alerts." group:"Alerts"`
	Postgres PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (reconcileCmd) Help() string {
	return `Reads every message of the stream of events and looks for its one verdict in Postgres, and every alert in both places. A message that its consumer has not acknowledged yet waits, and is no difference. Exit code 0 where both sides agree, 3 where they do not.

Example:

  decuwatch reconcile`
}

// reconciliation is what both sides hold.
type reconciliation struct {
	Messages    int `json:"messages"`     // of the stream of events
	Scores      int `json:"scores"`       // messages whose verdict is a score
	Skips       int `json:"skips"`        //
	DeadLetters int `json:"dead_letters"` //
	Repeats     int `json:"repeats"`      // messages that repeat an event, whose first verdict stands
	Waiting     int `json:"waiting"`      // without a verdict, not acknowledged yet
	Missing     int `json:"missing"`      // acknowledged, without a verdict
	Several     int `json:"several"`      // with more than one verdict

	Alerts        int `json:"alerts"`         // of Postgres
	Published     int `json:"published"`      // of them in the stream of alerts
	HeldBack      int `json:"held_back"`      // of them beyond their volume: stored, and counted by a summary
	OwedAlerts    int `json:"owed_alerts"`    // of them still in the outbox
	LostAlerts    int `json:"lost_alerts"`    // of them neither there nor owed
	UnknownAlerts int `json:"unknown_alerts"` // in the stream, unknown to Postgres

	Differences []string `json:"differences,omitempty"` // the first few, in words
}

// maxDifferences bounds the differences that are spelled out.
const maxDifferences = 20

func (r *reconciliation) differ(format string, args ...any) {
	if len(r.Differences) < maxDifferences {
		r.Differences = append(r.Differences, fmt.Sprintf(format, args...))
	}
}

// agrees reports whether every acknowledged event has exactly one verdict and every alert is where it should be.
func (r *reconciliation) agrees() bool {
	return r.Missing == 0 && r.Several == 0 && r.LostAlerts == 0 && r.UnknownAlerts == 0
}

func (c *reconcileCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	nc, err := c.NATS.connect("reconcile", false, log)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	store, err := postgres.Open(ctx, c.Postgres.config(log))
	if err != nil {
		return err
	}
	defer store.Close()
	r, err := reconcile(ctx, js, store, c.Stream.Name, c.Alerts.Stream, s)
	if err != nil {
		return err
	}
	if c.JSON {
		err = writeJSON(s.out, r)
	} else {
		err = r.print(s)
	}
	if err == nil && !r.agrees() {
		err = errDifference
	}
	return err
}

// reconcile holds the streams against Postgres.
func reconcile(ctx context.Context, js jetstream.JetStream, store *postgres.Store, events, alerts string, s *streams) (*reconciliation, error) {
	r := &reconciliation{}
	if err := r.events(ctx, js, store, events, s); err != nil {
		return nil, fmt.Errorf("reconcile %s: %w", events, err)
	}
	if err := r.alerts(ctx, js, store, alerts); err != nil {
		return nil, fmt.Errorf("reconcile %s: %w", alerts, err)
	}
	return r, nil
}

// message is what is kept of a message until its verdict is looked up.
type message struct {
	sequence uint64
	subject  string
	digest   string
	event    *schema.Event // nil where it cannot be decoded
}

// chunk is how many messages are looked up at once.
const chunk = 1000

func (r *reconciliation) events(ctx context.Context, js jetstream.JetStream, store *postgres.Store, name string, s *streams) error {
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return err
	}
	// What is acknowledged now has its verdict already; what is acknowledged later may get it while this runs.
	waits, err := acknowledged(ctx, stream)
	if err != nil {
		return err
	}
	bar := progress(s, int(min(stream.CachedInfo().State.Msgs, math.MaxInt32)), "reconciling") //nolint:gosec // bounded
	var batch []message
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		verdicts, err := store.VerdictsBySequence(ctx, name, batch[0].sequence, batch[len(batch)-1].sequence)
		if err != nil {
			return err
		}
		bySequence := map[uint64][]postgres.SequenceVerdict{}
		for _, v := range verdicts {
			bySequence[v.Sequence] = append(bySequence[v.Sequence], v)
		}
		for _, m := range batch {
			if err := r.message(ctx, store, m, bySequence[m.sequence], waits); err != nil {
				return err
			}
		}
		err = bar.Add(len(batch))
		batch = batch[:0]
		return err
	}
	err = readAll(ctx, stream, func(msg jetstream.Msg, sequence uint64) error {
		r.Messages++
		m := message{sequence: sequence, subject: msg.Subject(), digest: schema.Digest(msg.Headers(), msg.Data())}
		if e, err := schema.Decode(msg.Headers(), msg.Data()); err == nil {
			m.event = &e
		}
		if batch = append(batch, m); len(batch) < chunk {
			return nil
		}
		return flush()
	})
	if err == nil {
		err = flush()
	}
	_ = bar.Exit() // it only draws
	return err
}

// message counts one message and its verdicts.
func (r *reconciliation) message(ctx context.Context, store *postgres.Store, m message, verdicts []postgres.SequenceVerdict, waits func(message) bool) error {
	var own []postgres.SequenceVerdict
	for _, v := range verdicts {
		if v.Digest == m.digest { // else of a stream that was made anew
			own = append(own, v)
		}
	}
	switch {
	case len(own) > 1:
		r.Several++
		r.differ("message %d has %d verdicts", m.sequence, len(own))
		return nil
	case len(own) == 1:
		switch own[0].Outcome {
		case postgres.OutcomeScore:
			r.Scores++
		case postgres.OutcomeSkip:
			r.Skips++
		case postgres.OutcomeRepeat:
			r.Repeats++
		default:
			r.DeadLetters++
		}
		return nil
	}
	if m.event != nil {
		_, found, err := store.Lookup(ctx, m.event.Source, m.event.ID, m.digest)
		var other *schema.Invalid // the identifier is another message's
		if err != nil && !errors.As(err, &other) {
			return err
		}
		if err == nil && found {
			r.Repeats++
			return nil
		}
	}
	if waits(m) {
		r.Waiting++
		return nil
	}
	r.Missing++
	id := "not an event"
	if m.event != nil {
		id = fmt.Sprintf("%s of %s", printable(m.event.ID), printable(m.event.Source))
	}
	r.differ("message %d on %s (%s) is acknowledged and has no verdict", m.sequence, printable(m.subject), id)
	return nil
}

// acknowledged returns whether a message may still wait for its verdict, by the state of the consumers at this moment.
func acknowledged(ctx context.Context, stream jetstream.Stream) (func(message) bool, error) {
	floors := map[string]uint64{} // all messages of the model up to here are acknowledged
	list := stream.ListConsumers(ctx)
	for info := range list.Info() {
		floor := info.AckFloor.Stream
		if info.NumPending == 0 && info.NumAckPending == 0 {
			floor = math.MaxUint64
		}
		floors[info.Name] = floor
	}
	if err := list.Err(); err != nil && !errors.Is(err, jetstream.ErrEndOfData) {
		return nil, err
	}
	last := stream.CachedInfo().State.LastSeq
	return func(m message) bool {
		model := strings.TrimPrefix(m.subject, schema.SubjectGeneration(""))
		floor, owned := floors[consumers.Durable(model)]
		return !owned || m.sequence > min(floor, last)
	}, nil
}

func (r *reconciliation) alerts(ctx context.Context, js jetstream.JetStream, store *postgres.Store, name string) error {
	// The outbox before the stream: what it no longer owes by now is in the stream.
	stats, err := store.OutboxStats(ctx)
	if err != nil {
		return err
	}
	var since time.Time
	published := map[string]bool{}
	stream, err := js.Stream(ctx, name)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound): // made with the first alert
	case err != nil:
		return err
	default:
		if state := stream.CachedInfo().State; state.FirstSeq > 1 {
			since = state.FirstTime // older ones have left the stream
		}
	}
	sent, err := store.AlertsSent(ctx, since)
	if err != nil {
		return err
	}
	if stream != nil {
		err := readAll(ctx, stream, func(msg jetstream.Msg, _ uint64) error {
			if a, err := schema.DecodeAlert(msg.Data()); err == nil {
				published[a.ID] = true
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, st := range stats {
		if st.Sink == postgres.SinkStream {
			r.OwedAlerts = int(st.Pending)
		}
	}
	absent := 0
	for id, goes := range sent {
		r.Alerts++
		switch {
		case published[id]:
			r.Published++
		case !goes:
			r.HeldBack++
		default:
			absent++
		}
	}
	if absent > r.OwedAlerts {
		r.LostAlerts = absent - r.OwedAlerts
		r.differ("%d alerts are neither in the stream nor owed to it", r.LostAlerts)
	}
	for id := range published {
		if _, known := sent[id]; known {
			continue
		}
		_, err := store.AlertByID(ctx, id)
		if errors.Is(err, postgres.ErrNotFound) {
			r.UnknownAlerts++
			r.differ("alert %s of the stream is unknown to Postgres", printable(id))
		} else if err != nil {
			return err
		}
	}
	return nil
}

// readAll calls f with every message that the stream holds at this moment, in order.
func readAll(ctx context.Context, stream jetstream.Stream, f func(jetstream.Msg, uint64) error) error {
	info, err := stream.Info(ctx)
	if err != nil {
		return err
	}
	last := info.State.LastSeq
	if info.State.Msgs == 0 {
		return nil
	}
	consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy, InactiveThreshold: time.Minute})
	if err != nil {
		return err
	}
	messages, err := consumer.Messages()
	if err != nil {
		return err
	}
	defer messages.Stop()
	defer context.AfterFunc(ctx, messages.Stop)()
	for {
		msg, err := messages.Next()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		if meta.Sequence.Stream <= last {
			if err := f(msg, meta.Sequence.Stream); err != nil {
				return err
			}
		}
		if meta.Sequence.Stream >= last || meta.NumPending == 0 {
			return nil
		}
	}
}

func (r *reconciliation) print(s *streams) error {
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%d\t messages\t\n", r.Messages)
	for _, line := range []struct {
		n    int
		what string
	}{
		{r.Scores, "scores"}, {r.Skips, "skips"}, {r.DeadLetters, "dead letters"}, {r.Repeats, "repeats of an event, whose first verdict stands"},
		{r.Waiting, "waiting for a verdict"}, {r.Missing, "acknowledged WITHOUT a verdict"}, {r.Several, "with SEVERAL verdicts"},
	} {
		fmt.Fprintf(w, "%d\t %s\t\n", line.n, line.what)
	}
	return errors.Join(w.Flush(), r.printAlerts(s))
}

func (r *reconciliation) printAlerts(s *streams) error {
	fmt.Fprintf(s.out, "%d alerts, %d published, %d held back, %d owed, %d lost, %d unknown\n", r.Alerts, r.Published, r.HeldBack, r.OwedAlerts, r.LostAlerts, r.UnknownAlerts)
	for _, d := range r.Differences {
		fmt.Fprintf(s.out, "  %s\n", d)
	}
	verdict := "Both sides agree."
	if !r.agrees() {
		verdict = "The two sides do NOT agree."
	}
	_, err := fmt.Fprintln(s.out, verdict)
	return err
}
