package consumers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/decuwatch/decuwatch/schema"
)

const (
	sweepChunk       = 1000        // sequence numbers that are compared with the ledger at once
	sweepMost        = 200_000     // sequence numbers in one round
	concurrentWrites = 16          // dead letters that are written at once
	clockSpread      = time.Minute // maximum difference of the server's clock and the ledger's
	fullShare        = 0.75        // share of the stream's limit above which all settled messages are purged

	// How long this process must itself have seen that a consumer is orphaned. After an outage of everything, workers of
	// other models may start first.
	orphanWatch = 10 * time.Minute
)

// sweeper walks the stream: it makes dead letters of messages that nobody takes, compares each sequence number with the
// ledger, and purges settled messages.
type sweeper struct {
	*Runner
	settledTo map[string]uint64 // by subject that nobody takes: all messages up to here have a verdict
	stranded  uint64            // acknowledged message that had no verdict in the last round
	restored  bool              // see setBack
}

func newSweeper(r *Runner) *sweeper { return &sweeper{Runner: r, settledTo: map[string]uint64{}} }

// sweep does one round. A step that fails is tried again in the next round.
func (s *sweeper) sweep(ctx, work context.Context, r round) {
	for _, step := range []func(context.Context, context.Context, round) error{s.deadLetterUntaken, s.account, s.purge} {
		err := step(ctx, work, r)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.log.Warn("sweeping the stream failed and is tried again", "stream", s.cfg.Stream.Name, "err", err)
		}
	}
}

// deadLetterUntaken makes dead letters of messages that nobody will take.
func (s *sweeper) deadLetterUntaken(ctx, work context.Context, r round) error {
	for subject := range s.settledTo {
		if !r.owners[subject].nobody() {
			delete(s.settledTo, subject)
		}
	}
	var errs []error
	for _, subject := range r.subjects() {
		if o := r.owners[subject]; o.nobody() && ctx.Err() == nil {
			errs = append(errs, s.deadLetterSubject(ctx, work, r, subject, o))
		}
	}
	return errors.Join(errs...)
}

// nobody reports whether nobody takes the subject's events.
func (o owner) nobody() bool { return o.Ownership == Unowned || o.Ownership == Orphaned }

// verdict returns the dead letter of a subject that nobody takes, and how long a message waits before it becomes one.
func (s *sweeper) verdict(subject string, o owner, now time.Time) (decision, time.Duration) {
	d := decision{action: deadLetter, field: "data.model"}
	if o.Ownership == Orphaned {
		d.kind = schema.KindOrphaned
		d.reason = clean(fmt.Sprintf("nobody has pulled from the consumer %s for %s",
			Durable(strings.TrimPrefix(subject, subjectPrefix)), now.Sub(o.since).Round(time.Second)))
		return d, s.cfg.OrphanGrace
	}
	d.kind, d.reason = schema.KindUnknownModel, clean(fmt.Sprintf("no consumer scores the subject %s", subject))
	return d, s.cfg.UnownedGrace
}

// due reports whether nobody has taken the subject's events for long enough.
func (o owner) due(now time.Time, grace time.Duration) bool {
	return now.Sub(o.since) >= grace && now.Sub(o.seen) >= min(grace, orphanWatch)
}

// deadLetterSubject makes dead letters of the subject's messages that have waited for the grace period, oldest first.
func (s *sweeper) deadLetterSubject(ctx, work context.Context, r round, subject string, o owner) error {
	d, grace := s.verdict(subject, o, r.view.Time)
	if !o.due(r.view.Time, grace) {
		return nil
	}
	position, err := s.position(ctx, r.view)
	if err != nil {
		return err
	}
	next := max(position, s.settledTo[subject]) + 1
	for more := true; more; {
		group, writing := errgroup.WithContext(work)
		for range concurrentWrites {
			m, err := ReadNext(ctx, s.js, s.cfg.Stream.Name, next, subject)
			switch {
			case errors.Is(err, jetstream.ErrMsgNotFound):
				more = false
			case err != nil:
				return errors.Join(err, group.Wait())
			case m.Sequence > r.view.State.LastSeq || r.view.Time.Sub(m.Time) < grace:
				more = false
			}
			if !more {
				break
			}
			next = m.Sequence + 1
			group.Go(func() error { return s.deadLetterMessage(writing, r.view, m, d) })
		}
		if err := group.Wait(); err != nil {
			return err
		}
		s.settledTo[subject] = next - 1
	}
	return nil
}

// deadLetterMessage makes a dead letter of a message, unless it has a verdict.
func (s *sweeper) deadLetterMessage(work context.Context, v *View, m Stored, d decision) error {
	if s.cfg.Ledger != nil {
		rows, err := s.settled(work, v, m.Sequence, m.Sequence)
		if err != nil || slices.Contains(rows[m.Sequence].digests, m.Digest()) {
			return err
		}
	}
	in, _, err := s.load(work, m.Sequence, 1, m.Subject)
	if err != nil {
		return err
	}
	return s.deadLetter(work, in, d)
}

// position returns the sequence number up to which the stream has been swept.
func (s *sweeper) position(ctx context.Context, v *View) (uint64, error) {
	if s.cfg.Ledger == nil {
		return max(v.State.FirstSeq, 1) - 1, nil
	}
	first := max(v.State.FirstSeq, 1) - 1
	position, err := s.cfg.Ledger.Position(ctx, s.cfg.Stream.Name, v.Created, first)
	if err != nil || position <= first {
		return position, err
	}
	back, err := s.setBack(ctx, v, position)
	if err != nil {
		return 0, err
	}
	if back {
		return first, nil
	}
	return position, nil
}

// setBack reports whether the stream was restored from a copy that is older than its position. Such a stream continues
// after the copy's end, and gives new messages sequence numbers that were swept before. Nothing below the position
// counts as swept until the message at the position has its verdict, which the ledger shows by its digest.
func (s *sweeper) setBack(ctx context.Context, v *View, position uint64) (bool, error) {
	back := v.State.LastSeq < position
	if !back {
		m, err := ReadNext(ctx, s.js, s.cfg.Stream.Name, position, ">")
		if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && m.Sequence != position {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		rows, err := s.settled(ctx, v, position, position)
		if err != nil {
			return false, err
		}
		back = !slices.Contains(rows[position].digests, m.Digest())
	}
	if back && !s.restored {
		s.log.Error("the stream was set back: it has other messages than before, and each is checked again",
			"stream", s.cfg.Stream.Name, "last", v.State.LastSeq, "swept_to", position)
		clear(s.settledTo)
	}
	s.restored = back
	return back, nil
}

// account compares the sequence numbers that were not swept yet with the ledger, up to the first message that still
// waits for its verdict.
func (s *sweeper) account(ctx, work context.Context, r round) error {
	if s.cfg.Ledger == nil {
		return nil
	}
	position, err := s.position(ctx, r.view)
	if err != nil {
		return err
	}
	for end := min(r.view.State.LastSeq, position+sweepMost); position < end; {
		wanted := min(position+sweepChunk, end)
		to, lost, err := s.accountChunk(ctx, work, r, position+1, wanted)
		if err != nil || to == position {
			return err
		}
		mine, err := s.cfg.Ledger.Advance(ctx, s.cfg.Stream.Name, r.view.Created, position, to)
		if err != nil || !mine {
			return err
		}
		if len(lost) > 0 {
			s.cfg.Metrics.keeper.lost.Add(float64(len(lost)))
			s.log.Error("acknowledged events are gone from the stream and have no verdict", "stream", s.cfg.Stream.Name,
				"events", len(lost), "first", lost[0], "last", lost[len(lost)-1])
		}
		if to < wanted {
			return nil // the next message waits for its verdict
		}
		position = to
	}
	return nil
}

// accountChunk returns the sequence number up to which everything is accounted for, and which messages were lost.
func (s *sweeper) accountChunk(ctx, work context.Context, r round, from, to uint64) (uint64, []uint64, error) {
	rows, err := s.settled(ctx, r.view, from, to)
	if err != nil {
		return 0, nil, err
	}
	var lost []uint64
	for next := from; next <= to; next++ {
		if rows[next].certain {
			continue
		}
		m, err := ReadNext(ctx, s.js, s.cfg.Stream.Name, next, ">")
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			m.Sequence, err = to+1, nil
		}
		if err != nil {
			return 0, nil, err
		}
		gone, err := s.gone(ctx, r.view, next, min(m.Sequence-1, to))
		if err != nil {
			return 0, nil, err
		}
		lost = append(lost, gone...)
		if next = m.Sequence; next > to {
			break
		}
		done, err := s.accountMessage(ctx, work, r, m, rows[m.Sequence])
		if err != nil || !done {
			return m.Sequence - 1, lost, err
		}
	}
	return to, lost, nil
}

// row is what the ledger says of one sequence number.
type row struct {
	digests []string
	certain bool // it belongs to this stream, not to an earlier one of that name
}

func (s *sweeper) settled(ctx context.Context, v *View, from, to uint64) (map[uint64]row, error) {
	list, err := s.cfg.Ledger.Settled(ctx, s.cfg.Stream.Name, from, to)
	if err != nil {
		return nil, err
	}
	rows := make(map[uint64]row, len(list))
	for _, l := range list {
		r := rows[l.Sequence]
		r.digests = append(r.digests, l.Digest)
		r.certain = r.certain || l.At.After(v.Created.Add(clockSpread))
		rows[l.Sequence] = r
	}
	return rows, nil
}

// gone returns which of the messages from <= sequence <= to have no verdict. None of them is in the stream.
func (s *sweeper) gone(ctx context.Context, v *View, from, to uint64) ([]uint64, error) {
	if from > to {
		return nil, nil
	}
	// Another worker may have written the verdict and purged the message since the ledger was asked.
	rows, err := s.settled(ctx, v, from, to)
	if err != nil {
		return nil, err
	}
	var lost []uint64
	for seq := from; seq <= to; seq++ {
		if len(rows[seq].digests) == 0 {
			lost = append(lost, seq)
		}
	}
	return lost, nil
}

// accountMessage reports whether a message of the stream has its verdict. If a message of this worker's models was
// acknowledged without a verdict, it is handled here.
func (s *sweeper) accountMessage(ctx, work context.Context, r round, m Stored, rows row) (bool, error) {
	digest := m.Digest()
	if slices.Contains(rows.digests, digest) {
		return true, nil
	}
	model := strings.TrimPrefix(m.Subject, subjectPrefix)
	if ev, err := m.Decode(); err == nil {
		known, err := s.cfg.Ledger.Known(ctx, ev.Identity(), schema.Delivery{
			Stream: s.cfg.Stream.Name, Sequence: m.Sequence, Time: m.Time, Delivered: 1, Digest: digest,
		})
		var other *schema.Invalid // the id belongs to another event: the handler will find that
		if known || err != nil && !errors.As(err, &other) {
			return known, err
		}
	}
	c, consumed := r.view.Consumers[Durable(model)]
	if r.owners[m.Subject].Ownership != Owned || !consumed || m.Sequence > r.view.Floor(c) {
		return false, nil
	}
	if s.stranded != m.Sequence { // its advisory may be on its way
		s.stranded = m.Sequence
		return false, nil
	}
	if slices.Contains(s.cfg.Models, model) {
		s.log.Error("an event was acknowledged without a verdict, and is handled now", "model", model, "sequence", m.Sequence)
		return false, s.rescue(work, m)
	}
	return false, nil
}

// rescue handles a message that will not be delivered again. It is isolated like a message whose workers ended.
func (s *sweeper) rescue(work context.Context, m Stored) error {
	in, invalid, err := s.load(work, m.Sequence, endsToWatch+1, m.Subject)
	if err != nil {
		return err
	}
	work, end := s.trace(work, in)
	defer end()
	d := s.attempt(work, in, invalid, &heartbeat{beats: &heartbeats{}}) // there is no delivery to keep in flight
	s.log.Info("message handled", "action", string(d.action), "sequence", m.Sequence, "reason", d.reason)
	return nil
}

// purge removes settled messages that no consumer needs any more: the old ones, or all of them if the stream is nearly
// full.
func (s *sweeper) purge(ctx, _ context.Context, r round) error {
	if s.cfg.Ledger == nil || r.view.Config.DenyPurge || s.Settings() != nil {
		return nil //nolint:nilerr // nothing is purged while a setting is wrong; the keeper reports it
	}
	position, err := s.position(ctx, r.view)
	if err != nil {
		return err
	}
	now, err := ReadView(ctx, s.js, s.cfg.Stream.Name) // a consumer may have been created since
	if err != nil {
		return err
	}
	first, last := max(now.State.FirstSeq, 1), min(now.LowestFloor(), position)
	if now.Created != r.view.Created || last < first || now.State.Msgs == 0 {
		return nil
	}
	if share(now) < fullShare {
		last, err = s.cfg.Ledger.SettledBefore(ctx, s.cfg.Stream.Name, first, last, s.cfg.Stream.KeepSettled)
		if err != nil || last < first {
			return err
		}
	}
	var purged struct {
		answer
		Messages uint64 `json:"purged"`
	}
	request := fmt.Appendf(nil, `{"seq":%d}`, last+1)
	if err := ask(ctx, s.js, "STREAM.PURGE."+s.cfg.Stream.Name, request, &purged); err != nil {
		return fmt.Errorf("purge settled messages up to %d: %w", last, err)
	}
	s.cfg.Metrics.keeper.purged.Add(float64(purged.Messages))
	s.log.Debug("settled messages were purged", "stream", s.cfg.Stream.Name, "messages", purged.Messages, "last", last)
	return nil
}

// share returns how full the stream is: 1 refuses producers.
func share(v *View) float64 {
	full := 0.0
	if v.Config.MaxBytes > 0 {
		full = float64(v.State.Bytes) / float64(v.Config.MaxBytes)
	}
	if v.Config.MaxMsgs > 0 {
		full = max(full, float64(v.State.Msgs)/float64(v.Config.MaxMsgs))
	}
	return full
}
