package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// ErrConflict is returned for a change of a review that has changed since it was read. Nothing was written.
var ErrConflict = errors.New("somebody else changed it meanwhile")

// ErrAmbiguous is returned for an id prefix that several reviews share.
var ErrAmbiguous = errors.New("several reviews start with it; give more of the id")

// Kinds of a review.
const (
	ReviewAlert  = "alert"  // of a score with alerts
	ReviewSample = "sample" // of a score without an alert that was drawn at random
)

// Review is what a person looks at: one request with alerts, or one that was drawn at random.
type Review struct {
	ID             string               `json:"id"`
	Kind           string               `json:"kind"`     // alert or sample
	AlertID        string               `json:"alert_id"` // of the most severe alert; empty for a sample
	Source         string               `json:"source"`
	EventID        string               `json:"event_id"`
	EventTime      time.Time            `json:"event_time"`
	Model          string               `json:"model"`
	EnsembleDigest string               `json:"ensemble_digest"`
	ClassIndex     int                  `json:"class_index"`
	ClassLabel     string               `json:"class_label"`
	State          schema.ReviewState   `json:"state"`
	Verdict        schema.ReviewVerdict `json:"verdict"` // empty until resolved
	Assignee       string               `json:"assignee"`
	Version        int                  `json:"version"` // counts changes, from 1
	OpenedAt       time.Time            `json:"opened_at"`
	UpdatedAt      time.Time            `json:"updated_at"`
	ResolvedAt     *time.Time           `json:"resolved_at"`

	Severity    schema.Severity        `json:"severity"`    // of the most severe alert; empty for a sample
	Reason      schema.Reason          `json:"reason"`      // of that alert
	Measurement schema.MeasurementName `json:"measurement"` // of that alert

	Evidence         string `json:"evidence"` // pending, done or failed; empty without a job
	EvidenceAttempts int    `json:"evidence_attempts"`
	EvidenceError    string `json:"evidence_error"` // why the last attempt failed

	Labels   map[string]string                  `json:"labels"` // of the event
	Measured map[schema.MeasurementName]float64 `json:"-"`      // values, which a list does not show before the verdict

	Place ReviewPlace `json:"-"` // in the list that it was read from
}

// Identity returns what names the review's event.
func (r *Review) Identity() schema.Identity {
	return schema.Identity{Source: r.Source, ID: r.EventID, Model: r.Model}
}

// ReviewOrder is the order of a list of reviews: ReviewNewest, ReviewOldest, or the name of a measurement. Its highest
// value comes first.
type ReviewOrder string

// Orders of a list of reviews that are about time.
const (
	ReviewNewest ReviewOrder = "newest"
	ReviewOldest ReviewOrder = "oldest"
)

// ReviewOrders returns all orders.
func ReviewOrders() []ReviewOrder {
	list := []ReviewOrder{ReviewNewest, ReviewOldest}
	for _, name := range schema.MeasurementNames() {
		list = append(list, ReviewOrder(name))
	}
	return list
}

// ReviewFilter chooses reviews; a field at its zero value does not.
type ReviewFilter struct {
	States     []schema.ReviewState // any of them
	Model      string
	Class      *int
	ClassLabel string
	Assignee   string
	Severity   schema.Severity // of the most severe alert: leaves samples out
	Search     string          // part of an event's id or of a label's value, a label as name=value, or a review's id
	Order      ReviewOrder     // Defaults to ReviewNewest
	After      *ReviewPlace    // only what comes after it
	Before     *ReviewPlace    // only what comes before it: the last Limit of these
	Limit      int             // Defaults to 50
}

// ReviewPlace is a place in a list of reviews of one order.
type ReviewPlace struct {
	Key string // a number
	ID  string
}

func (p *ReviewPlace) args() []any {
	if p == nil {
		return []any{nil, nil}
	}
	return []any{p.Key, p.ID}
}

func (f ReviewFilter) args() []any {
	return []any{notNil(f.States), f.Model, f.Class, f.Assignee, f.Severity, f.ClassLabel, f.Search}
}

// Reviews returns the reviews that the filter lets through, in its order.
func (s *Store) Reviews(ctx context.Context, f ReviewFilter) ([]Review, error) {
	if f.Limit == 0 {
		f.Limit = 50
	}
	args := append(f.args(), cmp.Or(f.Order, ReviewNewest))
	args = append(append(args, f.After.args()...), f.Before.args()...)
	found, err := list(ctx, s.pool, func(row pgx.CollectableRow) (Review, error) {
		var r Review
		var place string
		err := row.Scan(&place, &r)
		r.Place = ReviewPlace{place, r.ID}
		return r, err
	}, reviewsList, append(args, f.Limit)...)
	if err != nil {
		return nil, fmt.Errorf("read reviews: %w", err)
	}
	if f.Before != nil {
		slices.Reverse(found)
	}
	return found, nil
}

// ReviewPosition is where a review stands, or stood, in a list.
type ReviewPosition struct {
	Place         ReviewPlace
	Listed        bool   // it is one of the list
	Before, After int    // how many reviews of the list come before and after it
	Previous      string // id of the one before it; empty if there is none
	Next          string
}

// ReviewPosition returns where a review stands among those that the filter lets through. It need not be one of them
// any more. The error is ErrNotFound if there is no such review.
func (s *Store) ReviewPosition(ctx context.Context, f ReviewFilter, id string) (ReviewPosition, error) {
	p := ReviewPosition{Place: ReviewPlace{ID: id}}
	err := s.pool.QueryRow(ctx, reviewPosition, append(f.args(), cmp.Or(f.Order, ReviewNewest), clean(id))...).
		Scan(&p.Place.Key, &p.Listed, &p.Before, &p.After, &p.Previous, &p.Next)
	if errors.Is(err, pgx.ErrNoRows) {
		return p, fmt.Errorf("review %s: %w", id, ErrNotFound)
	}
	if err != nil {
		return p, fmt.Errorf("read the place of review %s: %w", id, err)
	}
	return p, nil
}

// AlertsOf returns the alerts on one request, the most severe first.
func (s *Store) AlertsOf(ctx context.Context, of schema.Identity) ([]schema.Alert, error) {
	found, err := listAlerts(ctx, s.pool, alertsOfRequest, of.Source, of.ID, of.Model)
	if err != nil {
		return nil, fmt.Errorf("read the alerts of %s: %w", of.ID, err)
	}
	return found, nil
}

// ReviewCounts returns how many reviews the filter lets through by state; its States are not looked at.
func (s *Store) ReviewCounts(ctx context.Context, f ReviewFilter) (map[schema.ReviewState]int, error) {
	f.States = nil
	rows, err := s.pool.Query(ctx, reviewCounts, f.args()...)
	if err != nil {
		return nil, fmt.Errorf("count reviews: %w", err)
	}
	counts := map[schema.ReviewState]int{}
	var state schema.ReviewState
	var n int
	if _, err := pgx.ForEachRow(rows, []any{&state, &n}, func() error { counts[state] = n; return nil }); err != nil {
		return nil, fmt.Errorf("count reviews: %w", err)
	}
	return counts, nil
}

// ReviewClass is a class of a model.
type ReviewClass struct {
	Model string
	Index int
	Label string
}

// ReviewClasses returns the classes that have reviews, in order of model and label, at most 500.
func (s *Store) ReviewClasses(ctx context.Context) ([]ReviewClass, error) {
	found, err := list(ctx, s.pool, pgx.RowToStructByPos[ReviewClass], reviewClasses)
	if err != nil {
		return nil, fmt.Errorf("read classes of reviews: %w", err)
	}
	return found, nil
}

// ClassesScored returns the classes with an index, or with a label in upper or lower case, of which requests were
// scored. An empty model means every model.
func (s *Store) ClassesScored(ctx context.Context, model string, of schema.Class) ([]ReviewClass, error) {
	found, err := list(ctx, s.pool, pgx.RowToStructByPos[ReviewClass], classesScored, model, clean(of.Label), of.Index)
	if err != nil {
		return nil, fmt.Errorf("read classes: %w", err)
	}
	return found, nil
}

// ReviewByID returns a review by its id, by the id of any of its request's alerts, or by a prefix of one (6 characters
// or more) that no other review shares.
// The error is ErrNotFound if it does not exist.
func (s *Store) ReviewByID(ctx context.Context, id string) (Review, error) {
	id = clean(id)
	found, err := list(ctx, s.pool, pgx.RowTo[Review], reviewByID, id)
	if err == nil && len(found) == 0 && len(id) >= 6 {
		found, err = list(ctx, s.pool, pgx.RowTo[Review], reviewsByPrefix, id)
	}
	switch {
	case err != nil:
		return Review{}, fmt.Errorf("read review %s: %w", id, err)
	case len(found) == 0:
		return Review{}, fmt.Errorf("review %s: %w", id, ErrNotFound)
	case len(found) > 1:
		return Review{}, fmt.Errorf("review %s: %w", id, ErrAmbiguous)
	}
	return found[0], nil
}

// ReviewEntry is one change of a review.
type ReviewEntry struct {
	Version  int                  `json:"version"` // of the review after the change
	Action   string               `json:"action"`  // acknowledge, resolve, reopen, assign or comment
	Actor    string               `json:"actor"`
	State    schema.ReviewState   `json:"state"` // after the change, as are the next two
	Verdict  schema.ReviewVerdict `json:"verdict"`
	Assignee string               `json:"assignee"`
	Comment  string               `json:"comment"`
	At       time.Time            `json:"at"`
}

// ReviewHistory returns the changes of a review, the oldest first.
func (s *Store) ReviewHistory(ctx context.Context, id string) ([]ReviewEntry, error) {
	found, err := list(ctx, s.pool, pgx.RowToStructByPos[ReviewEntry], reviewHistory, id)
	if err != nil {
		return nil, fmt.Errorf("read history of review %s: %w", id, err)
	}
	return found, nil
}

// ReviewChange is one change of a review, with its messages.
type ReviewChange struct {
	Review   Review                 // after the change; its Version is the one that the change was decided on
	Action   string                 // acknowledge, resolve, reopen, assign or comment
	Actor    string                 // who
	Comment  string                 // at most 4000 characters
	At       time.Time              // when
	Messages []schema.OutboxMessage // what is owed to sinks
}

// ChangeReview writes a change with its entry in the history and its messages, in one transaction, and returns the
// review's new version. The error is ErrConflict if the review has changed since, and ErrNotFound if
// there is no such review; nothing was written then. It notifies ChannelReviews.
func (s *Store) ChangeReview(ctx context.Context, c ReviewChange) (version int, err error) {
	r := c.Review
	var resolved *time.Time
	if r.State == schema.ReviewResolved {
		resolved = r.ResolvedAt
	}
	var outbox []outboxRow
	for _, m := range c.Messages {
		outbox = append(outbox, outboxRow{m.Sink, m.AlertID, m.Subject, m.Header, m.Body})
	}
	err = s.begin(ctx, c.Action+" review "+r.ID, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, changeReview,
			r.ID, r.Version, r.State, optional(r.Verdict), clean(r.Assignee), c.At, resolved).Scan(&version)
		if errors.Is(err, pgx.ErrNoRows) {
			var there bool
			if err := tx.QueryRow(ctx, reviewExists, r.ID).Scan(&there); err != nil {
				return err
			}
			if !there {
				return ErrNotFound
			}
			return ErrConflict
		}
		if err != nil {
			return err
		}
		b := &batch{}
		b.Queue(insertReviewHistory,
			r.ID, version, c.Action, clean(c.Actor), r.State, optional(r.Verdict), clean(r.Assignee), clean(c.Comment), c.At)
		insert(b, "outbox", "ON CONFLICT DO NOTHING", outbox)
		if len(outbox) > 0 {
			b.notify(ChannelOutbox)
		}
		b.notify(ChannelReviews)
		return b.send(ctx, tx)
	})
	return version, err
}

// ReviewTally counts what precision and recall are estimated from: events of a window, canaries left out.
type ReviewTally struct {
	Scored          int // events with a score
	Alerted         int // of these, events with an alert
	AlertsConfirmed int // reviews of alerts by verdict
	AlertsExpected  int
	AlertsFalse     int
	AlertsOpen      int // reviews of alerts without a verdict
	EventsTrue      int // alerted events of which a review says confirmed or expected
	EventsFalse     int // alerted events all of whose verdicts say false_alarm
	Sampled         int // events without an alert that were drawn at random
	SamplesTrue     int // of these, with the verdict confirmed or expected
	SamplesFalse    int // of these, with the verdict false_alarm

	// If events are sampled, a score stands for several requests. Without that, what follows says the same as the counts.
	Requests        float64 // for which all scores stand
	RequestsAlerted float64 // for which the scores with an alert stand
	EventsShare     float64 // of the requests of reviewed alerted events, those that are true
	EventsWorth     float64 // how many events of equal weight the reviewed alerted ones are worth (Kish, 1965)
	SamplesShare    float64 // of the requests of reviewed samples, those that are true
	SamplesWorth    float64 // how many samples of equal weight the reviewed ones are worth
}

// TallyReviews counts the events whose time lies in [from, to), which should be whole hours. An empty model counts all;
// a nil class too.
func (s *Store) TallyReviews(ctx context.Context, model string, class *int, from, to time.Time) (ReviewTally, error) {
	var t ReviewTally
	err := s.pool.QueryRow(ctx, tallyReviews, model, class, from, to).Scan(
		&t.Scored, &t.Alerted, &t.AlertsConfirmed, &t.AlertsExpected, &t.AlertsFalse, &t.AlertsOpen, &t.EventsTrue,
		&t.EventsFalse, &t.Sampled, &t.SamplesTrue, &t.SamplesFalse, &t.Requests, &t.RequestsAlerted, &t.EventsShare,
		&t.EventsWorth, &t.SamplesShare, &t.SamplesWorth)
	if err != nil {
		return t, fmt.Errorf("count verdicts: %w", err)
	}
	return t, nil
}

// ScoreValues returns the newest values of a measurement of a series, canaries left out: of one class,
// or of all classes if class is nil. At most limit values, not older than since.
func (s *Store) ScoreValues(
	ctx context.Context, of schema.Series, measurement schema.MeasurementName, class *int, since time.Time, limit int,
) ([]float64, error) {
	if err := checkName(measurement); err != nil {
		return nil, err
	}
	values, err := list(ctx, s.pool, pgx.RowTo[float64], scoreValues,
		of.Model, of.EnsembleDigest, of.Settings, class, since, measurement, limit)
	if err != nil {
		return nil, fmt.Errorf("read scores: %w", err)
	}
	return values, nil
}
