package postgres

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/decuwatch/decuwatch/schema"
)

// Recorded is the verdict that stands on an event.
type Recorded struct {
	First    bool // this call wrote it; false where an earlier one stands
	Outcome  schema.Outcome
	Reason   string        // of a skip; kind of a dead letter
	Score    *schema.Score // nil where the outcome is another, or the score was dropped by retention
	AlertIDs []string      // of the score's alerts
}

// Record commits a verdict and returns when it is durable. Calls that run at the same time share one transaction.
//
// The ledger claims source, id and model for the verdict on an event. A dead letter claims them only if its message came on
// the subject of the event's own model, is not merely invalid, and was taken by a worker: nobody can settle the events of
// others, a producer may send an event again, corrected, and events that nobody took may be sent again. A message that
// repeats an event is recorded as settled.
//
// The first verdict on an event stands: where the ledger holds one for the same source, id, model and digest, nothing is
// written and the first is returned, with First false. Where it holds one of another digest, an identifier was used
// for two different events of one model: a score or a skip is refused with *schema.Invalid on the field id (the caller makes a
// dead letter of it), and a dead letter is written under its stream, sequence and digest. A message that could not
// be decoded has that key only.
//
// Other errors: *schema.Invalid on the field time where no partition can hold it; ErrNotFinite; ErrClosed; the
// context's error, with which the verdict may still be written; a database error, with which it may have been
// written if the answer to the commit was lost. Each is safe to try again.
func (s *Store) Record(ctx context.Context, v schema.Verdict) (Recorded, error) {
	c, err := s.prepare(ctx, v)
	if err != nil {
		return Recorded{}, fmt.Errorf("record verdict: %w", err)
	}
	select {
	case s.queue <- c:
	case <-ctx.Done():
		return Recorded{}, fmt.Errorf("record verdict: wait for a transaction: %w", context.Cause(ctx))
	case <-s.closing:
		return Recorded{}, fmt.Errorf("record verdict: %w", ErrClosed)
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return Recorded{}, fmt.Errorf("record verdict: wait for the commit: %w", context.Cause(ctx))
	}
	if c.err != nil {
		return Recorded{}, fmt.Errorf("record verdict: %w", c.err)
	}
	if c.won {
		return c.result, nil
	}
	first, err := s.standing(ctx, *c.stands)
	if err != nil {
		return Recorded{}, fmt.Errorf("record verdict: %w", err)
	}
	return first, nil
}

// DeadLetter is Record of a verdict whose DeadLetter is set.
func (s *Store) DeadLetter(ctx context.Context, v schema.Verdict) error {
	if v.DeadLetter == nil {
		return errors.New("record dead letter: the verdict holds none")
	}
	_, err := s.Record(ctx, v)
	return err
}

// call is one verdict on its way through a transaction.
type call struct {
	event      *eventRow // nil where the message could not be decoded
	score      *scoreRow
	skip       *skipRow
	deadLetter *deadLetterRow
	alerts     []alertRow
	outbox     []outboxRow
	reviews    []reviewRow

	done   chan struct{} // closed when what follows is set
	result Recorded      // where this verdict stands
	won    bool          // this verdict was written
	stands *eventRow     // where an earlier verdict stands
	err    error
}

// key orders calls, so that transactions take locks in one order and cannot wait for each other in a circle.
func (c *call) key() string {
	if c.event != nil {
		return "e" + c.event.Source + "\n" + c.event.EventID + "\n" + c.event.Model
	}
	return fmt.Sprintf("m%s\n%020d\n%s", c.deadLetter.Stream, c.deadLetter.Sequence, c.deadLetter.Digest)
}

// claims reports whether the verdict takes the identity of its event.
func (c *call) claims() bool {
	return c.event != nil && (c.deadLetter == nil || !slices.Contains(untaken, c.deadLetter.Kind))
}

// prepare checks a verdict and makes its rows, in the caller's goroutine.
func (s *Store) prepare(ctx context.Context, v schema.Verdict) (*call, error) {
	c := &call{done: make(chan struct{})}
	set := 0
	var event *schema.Event
	if v.Score != nil {
		set++
		event = &v.Score.Event
		if err := checkScore(v.Score); err != nil {
			return nil, err
		}
		row := newScoreRow(v.Score)
		c.score = &row
		c.result = Recorded{First: true, Outcome: schema.OutcomeScore, Score: v.Score}
		for _, a := range v.Alerts {
			if err := c.addAlert(a, s.config.Sinks); err != nil {
				return nil, err
			}
		}
		if v.Sampled && len(v.Alerts) == 0 {
			c.reviews = append(c.reviews, reviewRow{
				ID: SampleID(event.Identity()), Kind: "sample", Source: row.Source, EventID: row.EventID, EventTime: row.EventTime,
				Model: row.Model, EnsembleDigest: row.EnsembleDigest, ClassIndex: row.ClassIndex, ClassLabel: row.ClassLabel,
			})
		}
		if err := s.ensureMonth(ctx, row.EventTime); err != nil {
			return nil, err
		}
	}
	if v.Skip != nil {
		set++
		event = &v.Skip.Event
		c.skip = &skipRow{
			Source: event.Source, EventID: event.ID, EventTime: event.Time, Model: event.Data.Model, Class: event.Data.Class.String(),
			Reason: v.Skip.Reason, Detail: clean(v.Skip.Detail), Labels: labels(event.Data.Labels),
		}
		c.result = Recorded{First: true, Outcome: schema.OutcomeSkip, Reason: string(v.Skip.Reason)}
	}
	if v.DeadLetter != nil {
		set++
		if ofItsModel(v.DeadLetter) {
			event = v.DeadLetter.Event
		}
		c.deadLetter = newDeadLetterRow(v)
		c.result = Recorded{First: true, Outcome: schema.OutcomeDeadLetter, Reason: string(v.DeadLetter.Kind)}
	}
	if set != 1 {
		return nil, fmt.Errorf("exactly one of Score, Skip and DeadLetter must be set, %d are", set)
	}
	if event != nil {
		c.event = &eventRow{
			Source: event.Source, EventID: event.ID, Digest: v.Delivery.Digest, Outcome: c.result.Outcome, Reason: c.result.Reason,
			EventTime: event.Time, Model: event.Data.Model, Stream: v.Delivery.Stream, Sequence: int64(v.Delivery.Sequence), Delivered: v.Delivery.Delivered,
		}
		if c.score != nil {
			c.event.EnsembleDigest = &c.score.EnsembleDigest
		}
	}
	return c, nil
}

// kindInvalid is the kind of dead letters of messages that break the format. Their producer may send the event again,
// corrected.
const kindInvalid = "invalid"

// untaken are the kinds of dead letters of messages that no worker took. They say nothing about the event, so they do not
// claim it: sent again when somebody scores its model, it gets its verdict.
var untaken = []schema.DeadLetterKind{schema.KindUnknownModel, schema.KindOrphaned}

// ofItsModel reports whether a dead letter is about its event, not only about its message. Whoever may publish on one
// subject must not settle the events of another, so only a message on the subject of its own model is.
func ofItsModel(l *schema.DeadLetter) bool {
	return l.Event != nil && l.Kind != kindInvalid && (l.Subject == "" || l.Subject == schema.SubjectGeneration(l.Event.Data.Model))
}

// addAlert adds an alert with its review, where it is about a score, and what is owed to the sinks.
func (c *call) addAlert(a schema.Alert, sinks []schema.Sink) error {
	if err := checkAlert(a); err != nil {
		return err
	}
	header, body, err := schema.EncodeAlert(a)
	if err != nil {
		return err
	}
	c.alerts = append(c.alerts, newAlertRow(a))
	c.result.AlertIDs = append(c.result.AlertIDs, a.ID)
	for _, sink := range sinks {
		c.outbox = append(c.outbox, outboxRow{Sink: sink, MessageID: a.ID, Subject: schema.AlertSubject(a), Headers: header, Body: body})
	}
	if c.score != nil {
		c.reviews = append(c.reviews, reviewRow{
			ID: a.ID, Kind: "alert", AlertID: &a.ID, Source: a.Source, EventID: a.EventID, EventTime: a.EventTime, Model: a.Model,
			EnsembleDigest: a.Receipt.EnsembleDigest, ClassIndex: a.ClassIndex, ClassLabel: a.ClassLabel,
		})
	}
	return nil
}

func newDeadLetterRow(v schema.Verdict) *deadLetterRow {
	l := v.DeadLetter
	row := &deadLetterRow{
		Stream: v.Delivery.Stream, Sequence: int64(v.Delivery.Sequence), Digest: v.Delivery.Digest, Delivered: v.Delivery.Delivered,
		Subject: clean(l.Subject), Payload: l.Payload[:min(len(l.Payload), schema.MaxPayload)], Kind: l.Kind, Field: clean(l.Field), Reason: clean(l.Reason),
		PayloadSize: len(l.Payload), PayloadState: payloadWhole,
	}
	if len(l.Payload) > len(row.Payload) {
		row.PayloadState = payloadCut
	}
	if l.Event != nil {
		row.Source, row.EventID, row.EventTime, row.Model = &l.Event.Source, &l.Event.ID, &l.Event.Time, &l.Event.Data.Model
	} else {
		row.Source, row.EventID = optional(clean(l.Source)), optional(clean(l.EventID))
	}
	if model, ok := strings.CutPrefix(row.Subject, schema.SubjectGeneration("")); row.Model == nil && ok && model != "" {
		row.Model = &model
	}
	return row
}

// clean makes text of a stranger's bytes: PostgreSQL refuses NUL and broken UTF-8.
func clean(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

// commitLoop takes what waits, up to a batch, into one transaction after the other: while one commits the next
// batch gathers.
func (s *Store) commitLoop() {
	for {
		var batch []*call
		select {
		case c := <-s.queue:
			batch = append(batch, c)
		case <-s.closing:
			return
		}
		for full := false; !full && len(batch) < s.config.BatchSize; {
			select {
			case c := <-s.queue:
				batch = append(batch, c)
			default:
				full = true
			}
		}
		s.commit(batch)
	}
}

// commit commits calls and answers each.
func (s *Store) commit(calls []*call) {
	for len(calls) > 0 {
		// The second of two calls on one event waits for the next round, where it finds the first one's verdict.
		round, later, seen := calls[:0:0], []*call(nil), map[string]bool{}
		for _, c := range calls {
			if key := c.key(); seen[key] {
				later = append(later, c)
			} else {
				seen[key] = true
				round = append(round, c)
			}
		}
		slices.SortFunc(round, func(a, b *call) int { return cmp.Compare(a.key(), b.key()) })
		s.commitRound(round)
		for _, c := range round {
			close(c.done)
		}
		calls = later
	}
}

// commitRound commits calls together; where the database refuses the contents of one, each by itself, so that one
// bad verdict does not fail its neighbours.
func (s *Store) commitRound(round []*call) {
	const tries = 3
	var err error
	for range tries {
		if err = s.transact(round); err == nil {
			return
		}
		if missingPartition(err) { // retention dropped the partition of an old event
			if e := s.ensureMonths(round); e != nil {
				err = e
				break
			}
			continue
		}
		if !collided(err) {
			break
		}
	}
	if len(round) > 1 && (Refused(err) || ofOneRow(err)) {
		for _, c := range round {
			s.commitRound([]*call{c})
		}
		return
	}
	for _, c := range round {
		c.won, c.stands, c.err = false, nil, err
	}
}

// ensureMonths creates the partitions of calls, whatever was known of them.
func (s *Store) ensureMonths(round []*call) error {
	s.months.Clear()
	for _, c := range round {
		if c.score == nil {
			continue
		}
		if err := s.ensureMonth(context.Background(), c.score.EventTime); err != nil {
			return err
		}
	}
	return nil
}

// transact writes what the ledger has no verdict on yet.
func (s *Store) transact(round []*call) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), s.config.CommitTimeout,
		fmt.Errorf("commit of %d verdicts timed out after %s", len(round), s.config.CommitTimeout))
	defer cancel()
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return s.write(ctx, tx, round) })
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return err
}

func (s *Store) write(ctx context.Context, tx pgx.Tx, round []*call) error {
	if err := boundPayloads(ctx, tx, round); err != nil {
		return err
	}
	byKey := make(map[schema.Identity]*call, len(round))
	var events []*eventRow
	for _, c := range round {
		c.won, c.stands, c.err = false, nil, nil
		if c.event != nil {
			byKey[c.event.identity()] = c
			events = append(events, c.event)
		}
	}
	if err := s.claim(ctx, tx, events, byKey); err != nil {
		return err
	}
	// Letters of their own key: messages that could not be decoded or that nobody took, and identifiers used twice.
	var letters []*deadLetterRow
	byMessage := map[string]*call{}
	for _, c := range round {
		if c.stands != nil && c.stands.Digest != c.event.Digest {
			if c.deadLetter == nil {
				c.err = usedTwice(c.stands.Outcome)
				continue
			}
			c.stands = nil
		} else if c.event != nil && (c.claims() || c.stands != nil) {
			continue
		}
		letters = append(letters, c.deadLetter)
		byMessage[messageKey(c.deadLetter.Stream, c.deadLetter.Sequence, c.deadLetter.Digest)] = c
	}
	if err := claimLetters(ctx, tx, letters, byMessage); err != nil {
		return err
	}
	if err := recordRepeats(ctx, tx, round); err != nil {
		return err
	}
	return insertWon(ctx, tx, round, s.config.Volume)
}

const (
	maxPayloadsPerHour = 8 << 20 // bytes of payloads that are stored whole, of dead letters that are the producer's fault
	leastPayload       = 256     // bytes of a payload that are always stored
)

// boundPayloads cuts the payloads of dead letters that are the producer's fault if the last hour brought too many bytes of them.
// Transactions that run at the same time may exceed the bound by what they write.
func boundPayloads(ctx context.Context, tx pgx.Tx, round []*call) error {
	var large []*deadLetterRow
	for _, c := range round {
		if l := c.deadLetter; l != nil && len(l.Payload) > leastPayload && l.Kind != "failed" && l.Kind != "given_up" && l.Kind != "orphaned" {
			large = append(large, l)
		}
	}
	if len(large) == 0 {
		return nil
	}
	var stored int
	err := tx.QueryRow(ctx, `SELECT coalesce(sum(octet_length(payload)), 0) FROM decuwatch.dead_letters
		WHERE recorded_at > now() - interval '1 hour' AND kind NOT IN ('failed', 'given_up', 'orphaned') AND payload_state <> 'expired'
		AND octet_length(payload) > $1`, leastPayload).Scan(&stored)
	if err != nil {
		return err
	}
	for _, l := range large {
		if stored+len(l.Payload) > maxPayloadsPerHour {
			l.Payload, l.PayloadState = l.Payload[:leastPayload], payloadCut
			continue
		}
		stored += len(l.Payload)
	}
	return nil
}

// claim inserts into the ledger; a call whose event is there already learns the verdict that stands. A score of an event
// that is older than scores are kept is refused.
func (s *Store) claim(ctx context.Context, tx pgx.Tx, events []*eventRow, byKey map[schema.Identity]*call) error {
	if len(events) == 0 {
		return nil
	}
	input, err := json.Marshal(events)
	if err != nil {
		return err
	}
	rows, err := tx.Query(ctx, `INSERT INTO decuwatch.events (`+eventColumns+`)
		SELECT `+eventColumns+` FROM json_populate_recordset(NULL::decuwatch.events, $1) i
		WHERE (outcome <> 'score' OR event_time >= now() - $2::interval)
		AND NOT (outcome = 'dead_letter' AND reason = ANY ($3))
		AND NOT EXISTS (SELECT FROM decuwatch.dead_letters d WHERE d.stream = i.stream AND d.sequence = i.sequence AND d.digest = i.digest)
		ORDER BY source, event_id, model ON CONFLICT DO NOTHING RETURNING source, event_id, model`, input, s.config.Maintenance.Scores, untaken)
	if err != nil {
		return err
	}
	won := 0
	var key schema.Identity
	_, err = pgx.ForEachRow(rows, []any{&key.Source, &key.ID, &key.Model}, func() error {
		byKey[key].won = true
		won++
		return nil
	})
	if err != nil || won == len(events) {
		return err
	}
	rows, err = tx.Query(ctx, `SELECT row_to_json(e) FROM decuwatch.events e
		JOIN json_populate_recordset(NULL::decuwatch.events, $1) i USING (source, event_id, model)`, input)
	if err != nil {
		return err
	}
	var row eventRow
	_, err = pgx.ForEachRow(rows, []any{&row}, func() error {
		if c := byKey[row.identity()]; !c.won {
			stands := row
			c.stands = &stands
		}
		row = eventRow{}
		return nil
	})
	if err != nil {
		return err
	}
	// The message may have a dead letter that does not claim its event.
	rows, err = tx.Query(ctx, `SELECT i.source, i.event_id, i.model, d.kind FROM decuwatch.dead_letters d
		JOIN json_populate_recordset(NULL::decuwatch.events, $1) i USING (stream, sequence, digest)`, input)
	if err != nil {
		return err
	}
	var kind string
	_, err = pgx.ForEachRow(rows, []any{&key.Source, &key.ID, &key.Model, &kind}, func() error {
		if c := byKey[key]; !c.won && (c.stands == nil || c.stands.Digest != c.event.Digest) {
			stands := *c.event
			stands.Outcome, stands.Reason = schema.OutcomeDeadLetter, kind
			c.stands = &stands
		}
		return nil
	})
	if err != nil {
		return err
	}
	var oldest time.Time
	if err := tx.QueryRow(ctx, `SELECT now() - $1::interval`, s.config.Maintenance.Scores).Scan(&oldest); err != nil {
		return err
	}
	for _, c := range byKey {
		switch {
		case c.won || c.stands != nil || !c.claims():
		case c.score != nil && c.event.EventTime.Before(oldest):
			c.err = s.tooOld(c.event.EventTime, oldest)
		default: // deleted by retention between the two statements
			return errors.New("the verdict that stands was just removed by retention")
		}
	}
	return nil
}

func messageKey(stream string, sequence int64, digest string) string {
	return fmt.Sprintf("%s %d %s", stream, sequence, digest)
}

// recordRepeats settles the messages that repeat an event whose verdict another message got.
func recordRepeats(ctx context.Context, tx pgx.Tx, round []*call) error {
	var repeats []repeatRow
	for _, c := range round {
		if c.event == nil || c.stands == nil || c.stands.Digest != c.event.Digest {
			continue
		}
		if c.stands.Stream != c.event.Stream || c.stands.Sequence != c.event.Sequence {
			repeats = append(repeats, repeatRow{
				Stream: c.event.Stream, Sequence: c.event.Sequence, Digest: c.event.Digest,
				Source: c.event.Source, EventID: c.event.EventID, Model: c.event.Model, Delivered: c.event.Delivered,
			})
		}
	}
	b := &batch{}
	b.insert("repeats", repeatColumns, "ON CONFLICT DO NOTHING", rowsOf(repeats))
	return b.send(ctx, tx)
}

// claimLetters inserts dead letters that the ledger does not cover. If the message has a verdict already, that stands.
func claimLetters(ctx context.Context, tx pgx.Tx, letters []*deadLetterRow, byMessage map[string]*call) error {
	if len(letters) == 0 {
		return nil
	}
	input, err := json.Marshal(letters)
	if err != nil {
		return err
	}
	rows, err := tx.Query(ctx, `INSERT INTO decuwatch.dead_letters (`+deadLetterColumns+`)
		SELECT `+deadLetterColumns+` FROM json_populate_recordset(NULL::decuwatch.dead_letters, $1) i
		WHERE NOT EXISTS (SELECT FROM decuwatch.events e WHERE e.stream = i.stream AND e.sequence = i.sequence AND e.digest = i.digest)
		ORDER BY stream, sequence, digest ON CONFLICT (stream, sequence, digest) DO NOTHING RETURNING stream, sequence, digest`, input)
	if err != nil {
		return err
	}
	var stream, digest string
	var sequence int64
	_, err = pgx.ForEachRow(rows, []any{&stream, &sequence, &digest}, func() error {
		byMessage[messageKey(stream, sequence, digest)].won = true
		return nil
	})
	if err != nil {
		return err
	}
	for _, c := range byMessage {
		if !c.won {
			c.stands = &eventRow{Outcome: schema.OutcomeDeadLetter, Reason: string(c.deadLetter.Kind)}
		}
	}
	if !slices.ContainsFunc(slices.Collect(maps.Values(byMessage)), func(c *call) bool { return !c.won }) {
		return nil
	}
	rows, err = tx.Query(ctx, `SELECT row_to_json(e) FROM decuwatch.events e
		JOIN json_populate_recordset(NULL::decuwatch.dead_letters, $1) i USING (stream, sequence, digest)`, input)
	if err != nil {
		return err
	}
	var row eventRow
	_, err = pgx.ForEachRow(rows, []any{&row}, func() error {
		if c := byMessage[messageKey(row.Stream, row.Sequence, row.Digest)]; !c.won {
			stands := row
			c.stands = &stands
		}
		row = eventRow{}
		return nil
	})
	return err
}

// insertWon inserts everything that belongs to the verdicts that stand now.
func insertWon(ctx context.Context, tx pgx.Tx, round []*call, volume Volume) error {
	var (
		scores  []*scoreRow
		skips   []*skipRow
		letters []*deadLetterRow
		alerts  []alertRow
		outbox  []outboxRow
		reviews []reviewRow
	)
	hours, days := map[classHourKey]*classHourRow{}, map[classHourKey]*classHourRow{}
	outcomes := map[outcomeHourRow]int{}
	for _, c := range round {
		if !c.won {
			continue
		}
		if c.score != nil {
			scores = append(scores, c.score)
			if _, canary := c.score.Labels[schema.LabelCanary]; !canary {
				addClass(hours, time.Hour, c.score, c.alerts)
				addClass(days, 24*time.Hour, c.score, c.alerts)
			}
		}
		if c.skip != nil {
			skips = append(skips, c.skip)
		}
		var hour time.Time // zero: of the recording
		model := ""
		if c.event != nil {
			hour, model = c.event.EventTime.UTC().Truncate(time.Hour), c.event.Model
		}
		if c.deadLetter != nil {
			if c.event != nil {
				letters = append(letters, c.deadLetter) // those without an event are written already; a second time does nothing
			}
			model = text(c.deadLetter.Model)
		}
		outcomes[outcomeHourRow{Hour: hour, Model: model, Outcome: c.result.Outcome, Reason: c.result.Reason}]++
		alerts = append(alerts, c.alerts...)
		outbox = append(outbox, c.outbox...)
		reviews = append(reviews, c.reviews...)
	}
	if err := limit(ctx, tx, volume, alerts); err != nil {
		return err
	}
	for _, a := range alerts {
		if a.Delivery != deliveryOwed {
			outbox = slices.DeleteFunc(outbox, func(o outboxRow) bool { return o.MessageID == a.ID })
		}
	}
	var counts []outcomeHourRow
	for row, n := range outcomes {
		row.N = n
		counts = append(counts, row)
	}
	b := &batch{}
	b.insert("scores", scoreColumns, "ON CONFLICT DO NOTHING", rowsOf(scores))
	b.insert("skips", skipColumns, "ON CONFLICT DO NOTHING", rowsOf(skips))
	b.insert("dead_letters", deadLetterColumns, "ON CONFLICT (stream, sequence, digest) DO NOTHING", rowsOf(letters))
	b.insert("alerts", alertColumns, "ON CONFLICT DO NOTHING", rowsOf(alerts))
	b.insert("outbox", outboxColumns, "ON CONFLICT DO NOTHING", rowsOf(outbox))
	b.review(reviews)
	b.insert("class_hour_parts", classHourColumns, "", rowsOf(slices.Collect(maps.Values(hours))))
	b.insert("class_day_parts", classDayColumns, "", rowsOf(dayRows(days)))
	b.insertAs("outcome_hour_parts", outcomeHourColumns, outcomeHourValues, "", rowsOf(counts))
	if len(outbox) > 0 {
		b.Queue(`SELECT pg_catalog.pg_notify($1, '')`, ChannelOutbox)
	}
	if len(reviews) > 0 {
		b.Queue(`SELECT pg_catalog.pg_notify($1, '')`, ChannelReviews)
	}
	return b.send(ctx, tx)
}

// batch is a list of statements that travel together.
type batch struct {
	pgx.Batch
	err error
}

// rowsOf makes JSON of rows, nil where there are none.
func rowsOf[T any](rows []T) func() ([]byte, error) {
	if len(rows) == 0 {
		return nil
	}
	return func() ([]byte, error) { return json.Marshal(rows) }
}

func (b *batch) insert(table, columns, conflict string, rows func() ([]byte, error)) {
	b.insertAs(table, columns, columns, conflict, rows)
}

// insertAs is insert with expressions for the columns.
func (b *batch) insertAs(table, columns, values, conflict string, rows func() ([]byte, error)) {
	if rows == nil || b.err != nil {
		return
	}
	input, err := rows()
	if err != nil {
		b.err = fmt.Errorf("%s: %w", table, err)
		return
	}
	b.Queue(`INSERT INTO decuwatch.`+table+` (`+columns+`) SELECT `+values+`
		FROM json_populate_recordset(NULL::decuwatch.`+table+`, $1) `+conflict, input)
}

// review opens reviews and asks for their evidence. Canaries are not reviewed.
func (b *batch) review(reviews []reviewRow) {
	if len(reviews) == 0 || b.err != nil {
		return
	}
	input, err := json.Marshal(reviews)
	if err != nil {
		b.err = fmt.Errorf("reviews: %w", err)
		return
	}
	b.Queue(`WITH opened AS (
			INSERT INTO decuwatch.reviews (`+reviewColumns+`) SELECT `+reviewColumns+` FROM json_populate_recordset(NULL::decuwatch.reviews, $1) i
			WHERE NOT EXISTS (SELECT FROM decuwatch.canaries c WHERE c.source = i.source AND c.event_id = i.event_id AND c.model = i.model)
			ON CONFLICT DO NOTHING RETURNING id
		) INSERT INTO decuwatch.evidence_jobs (review_id) SELECT id FROM opened ON CONFLICT DO NOTHING`, input)
}

func (b *batch) send(ctx context.Context, tx pgx.Tx) error {
	if b.err != nil || b.Len() == 0 {
		return b.err
	}
	return tx.SendBatch(ctx, &b.Batch).Close()
}

func dayRows(sums map[classHourKey]*classHourRow) []classDayRow {
	rows := make([]classDayRow, 0, len(sums))
	for _, row := range sums {
		rows = append(rows, classDayRow{*row, row.Hour})
	}
	return rows
}

// classHourKey is what one row of class_hour_parts sums over.
type classHourKey struct {
	hour                    time.Time
	model, digest, settings string
	class                   int
}

func addClass(sums map[classHourKey]*classHourRow, span time.Duration, s *scoreRow, alerts []alertRow) {
	hour := s.EventTime.UTC().Truncate(span)
	key := classHourKey{hour, s.Model, s.EnsembleDigest, s.Settings, s.ClassIndex}
	row := sums[key]
	if row == nil {
		row = &classHourRow{
			Hour: hour, Model: s.Model, EnsembleDigest: s.EnsembleDigest, Settings: s.Settings, ClassIndex: s.ClassIndex, ClassLabel: s.ClassLabel,
			ClassGapMin: s.ClassGap, ClassGapMax: s.ClassGap, RequestRiskMin: s.RequestRisk, RequestRiskMax: s.RequestRisk,
		}
		sums[key] = row
	}
	row.N++
	row.ClassGapSum += s.ClassGap
	row.ClassGapSquares += s.ClassGap * s.ClassGap
	row.ClassGapMin, row.ClassGapMax = min(row.ClassGapMin, s.ClassGap), max(row.ClassGapMax, s.ClassGap)
	row.RequestRiskSum += s.RequestRisk
	row.RequestRiskSquares += s.RequestRisk * s.RequestRisk
	row.RequestRiskMin, row.RequestRiskMax = min(row.RequestRiskMin, s.RequestRisk), max(row.RequestRiskMax, s.RequestRisk)
	row.ClassGapSaturated += one(s.ClassGapSaturated)
	row.RequestRiskSaturated += one(s.RequestRiskSaturated)
	row.Warnings += one(slices.ContainsFunc(alerts, func(a alertRow) bool { return a.Severity == schema.SeverityWarn }))
	row.Criticals += one(slices.ContainsFunc(alerts, func(a alertRow) bool { return a.Severity == schema.SeverityCritical }))
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

// refused tells an error about the contents of a row (data exceptions and constraint violations) from one of the
// connection or the server, which is nobody's fault.
func refused(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && len(e.Code) == 5 && (e.Code[:2] == "22" || e.Code[:2] == "23") && !missingPartition(err)
}

// Refused reports whether an error of Record or DeadLetter is about the verdict itself, so that no other try ends better.
// Any other says that the database is away, slow, locked or full.
func Refused(err error) bool {
	var invalid *schema.Invalid
	return errors.As(err, &invalid) || errors.Is(err, ErrNotFinite) || refused(err)
}

// ofOneRow tells an error that the contents of one row may have caused, although it does not say so: a limit, a trigger's
// exception, a page that cannot be read. The other rows are then written without it.
func ofOneRow(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && len(e.Code) == 5 && slices.Contains([]string{"21", "44", "54", "P0", "XX"}, e.Code[:2])
}

// collided tells an error that goes away when the transaction is tried again: a deadlock or a serialization failure.
func collided(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && (e.Code == "40P01" || e.Code == "40001")
}

func missingPartition(err error) bool {
	var e *pgconn.PgError
	// A violated constraint is named; a message would be in the server's language.
	return errors.As(err, &e) && e.Code == "23514" && e.TableName == "scores" && e.ConstraintName == ""
}
