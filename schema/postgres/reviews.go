package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// ErrConflict is returned for a change of a review that was changed by somebody else since it was read. Nothing was written.
var ErrConflict = errors.New("somebody else changed it meanwhile")

// ErrAmbiguous is returned for the beginning of an id with which several reviews begin.
var ErrAmbiguous = errors.New("several reviews begin so, give more of the id")

// Kinds of a review.
const (
	ReviewAlert  = "alert"  // of an alert on a score
	ReviewSample = "sample" // of a score without an alert that was drawn at random
)

// Review is what a person looks at: one alert, or one request that was drawn at random.
type Review struct {
	ID             string               `json:"id"`
	Kind           string               `json:"kind"`     // alert or sample
	AlertID        string               `json:"alert_id"` // empty for a sample
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

	Severity    schema.Severity        `json:"severity"`    // of the alert; empty for a sample
	Reason      schema.Reason          `json:"reason"`      // of the alert
	Measurement schema.MeasurementName `json:"measurement"` // of the alert

	Evidence         string `json:"evidence"` // pending, done or failed; empty where there is no job
	EvidenceAttempts int    `json:"evidence_attempts"`
	EvidenceError    string `json:"evidence_error"` // why the last attempt failed
}

// Identity returns what names the review's event.
func (r *Review) Identity() schema.Identity {
	return schema.Identity{Source: r.Source, ID: r.EventID, Model: r.Model}
}

// reviewQuery selects Reviews as r.
const reviewQuery = `SELECT row_to_json(x) FROM (
	SELECT r.id, r.kind, coalesce(r.alert_id, '') AS alert_id, r.source, r.event_id, r.event_time, r.model, r.ensemble_digest, r.class_index, r.class_label,
		r.state, coalesce(r.verdict, '') AS verdict, r.assignee, r.version, r.opened_at, r.updated_at, r.resolved_at,
		coalesce(a.severity, '') AS severity, coalesce(a.reason, '') AS reason, coalesce(a.measurement, '') AS measurement,
		coalesce(j.state, '') AS evidence, coalesce(j.attempts, 0) AS evidence_attempts, coalesce(j.last_error, '') AS evidence_error
	FROM decuwatch.reviews r
	LEFT JOIN decuwatch.alerts a ON a.id = r.alert_id
	LEFT JOIN decuwatch.evidence_jobs j ON j.review_id = r.id
	WHERE `

// ReviewFilter chooses reviews; a field at its zero value does not.
type ReviewFilter struct {
	States   []schema.ReviewState // any of them
	Model    string
	Class    *int
	Assignee string
	Severity schema.Severity // of the alert: leaves samples out
	After    *ReviewPlace
	Limit    int // Defaults to 50
}

// ReviewPlace is a place in a list of reviews.
type ReviewPlace struct {
	OpenedAt time.Time
	ID       string
}

const reviewWhere = `(cardinality($1::text[]) = 0 OR r.state = ANY ($1)) AND ($2 = '' OR r.model = $2) AND ($3::integer IS NULL OR r.class_index = $3)
	AND ($4 = '' OR r.assignee = $4) AND ($5 = '' OR a.severity = $5)`

func (f ReviewFilter) args() []any {
	return []any{notNil(f.States), f.Model, f.Class, f.Assignee, f.Severity}
}

// Reviews returns the reviews that the filter lets through, the newest first.
func (s *Store) Reviews(ctx context.Context, f ReviewFilter) ([]Review, error) {
	if f.Limit == 0 {
		f.Limit = 50
	}
	var at *time.Time
	var id *string
	if f.After != nil {
		at, id = &f.After.OpenedAt, &f.After.ID
	}
	rows, err := s.pool.Query(ctx, reviewQuery+reviewWhere+` AND ($6::timestamptz IS NULL OR (r.opened_at, r.id) < ($6, $7))
		ORDER BY r.opened_at DESC, r.id DESC LIMIT $8) x`, append(f.args(), at, id, f.Limit)...)
	if err != nil {
		return nil, fmt.Errorf("read reviews: %w", err)
	}
	found, err := pgx.CollectRows(rows, pgx.RowTo[Review])
	if err != nil {
		return nil, fmt.Errorf("read reviews: %w", err)
	}
	return found, nil
}

// ReviewCounts returns how many reviews the filter lets through by state; its States are not looked at.
func (s *Store) ReviewCounts(ctx context.Context, f ReviewFilter) (map[schema.ReviewState]int, error) {
	f.States = nil
	rows, err := s.pool.Query(ctx, `SELECT r.state, count(*) FROM decuwatch.reviews r LEFT JOIN decuwatch.alerts a ON a.id = r.alert_id
		WHERE `+reviewWhere+` GROUP BY r.state`, f.args()...)
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

// ReviewClass is a class that has reviews.
type ReviewClass struct {
	Model string
	Index int
	Label string
}

// ReviewClasses returns the classes that have reviews, in order of model and label, at most 500.
func (s *Store) ReviewClasses(ctx context.Context) ([]ReviewClass, error) {
	rows, err := s.pool.Query(ctx, `SELECT DISTINCT model, class_index, class_label FROM decuwatch.reviews ORDER BY model, class_label, class_index LIMIT 500`)
	if err != nil {
		return nil, fmt.Errorf("read classes of reviews: %w", err)
	}
	found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[ReviewClass])
	if err != nil {
		return nil, fmt.Errorf("read classes of reviews: %w", err)
	}
	return found, nil
}

// ReviewByID returns a review by its id, or by the beginning of its id (6 characters or more) if no other begins so. The error is
// ErrNotFound where there is none.
func (s *Store) ReviewByID(ctx context.Context, id string) (Review, error) {
	id = clean(id)
	found, err := s.reviewsWhere(ctx, `r.id = $1`, id)
	if err == nil && len(found) == 0 && len(id) >= 6 {
		found, err = s.reviewsWhere(ctx, `starts_with(r.id, $1) LIMIT 2`, id)
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

func (s *Store) reviewsWhere(ctx context.Context, where string, args ...any) ([]Review, error) {
	rows, err := s.pool.Query(ctx, reviewQuery+where+`) x`, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[Review])
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
	rows, err := s.pool.Query(ctx, `SELECT version, action, actor, state, coalesce(verdict, ''), assignee, comment, at
		FROM decuwatch.review_history WHERE review_id = $1 ORDER BY version`, id)
	if err != nil {
		return nil, fmt.Errorf("read history of review %s: %w", id, err)
	}
	found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[ReviewEntry])
	if err != nil {
		return nil, fmt.Errorf("read history of review %s: %w", id, err)
	}
	return found, nil
}

// ReviewChange is one change of a review and what is told of it.
type ReviewChange struct {
	Review  Review                 // as it shall be; its Version is the one that the change was decided on
	Action  string                 // acknowledge, resolve, reopen, assign or comment
	Actor   string                 // who
	Comment string                 // at most 4000 characters
	At      time.Time              // when
	Tell    []schema.OutboxMessage // what is owed to sinks
}

// ChangeReview writes a change with its entry in the history and its messages, in one transaction, and returns the review's
// new version. The error is ErrConflict where the review's version is another by now, and ErrNotFound where there is no
// such review; nothing was written then. It notifies ChannelReviews.
func (s *Store) ChangeReview(ctx context.Context, c ReviewChange) (version int, err error) {
	r := c.Review
	var resolved *time.Time
	if r.State == schema.ReviewResolved {
		resolved = r.ResolvedAt
	}
	var outbox []outboxRow
	for _, m := range c.Tell {
		outbox = append(outbox, outboxRow{m.Sink, m.AlertID, m.Subject, m.Header, m.Body})
	}
	err = s.begin(ctx, c.Action+" review "+r.ID, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `UPDATE decuwatch.reviews SET state = $3, verdict = $4, assignee = $5, version = version + 1, updated_at = $6, resolved_at = $7
			WHERE id = $1 AND version = $2 RETURNING version`,
			r.ID, r.Version, r.State, optional(r.Verdict), clean(r.Assignee), c.At, resolved).Scan(&version)
		if errors.Is(err, pgx.ErrNoRows) {
			var there bool
			if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM decuwatch.reviews WHERE id = $1)`, r.ID).Scan(&there); err != nil {
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
		b.Queue(`INSERT INTO decuwatch.review_history (review_id, version, action, actor, state, verdict, assignee, comment, at)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)`,
			r.ID, version, c.Action, clean(c.Actor), r.State, optional(r.Verdict), clean(r.Assignee), clean(c.Comment), c.At)
		b.insert("outbox", outboxColumns, "ON CONFLICT DO NOTHING", rowsOf(outbox))
		if len(outbox) > 0 {
			b.Queue(`SELECT pg_catalog.pg_notify($1, '')`, ChannelOutbox)
		}
		b.Queue(`SELECT pg_catalog.pg_notify($1, '')`, ChannelReviews)
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
}

// TallyReviews counts the events whose time lies in [from, to), which should be whole hours. An empty model counts all; a nil
// class too.
func (s *Store) TallyReviews(ctx context.Context, model string, class *int, from, to time.Time) (ReviewTally, error) {
	var t ReviewTally
	err := s.pool.QueryRow(ctx, `
		WITH scored AS (
			SELECT coalesce(sum(n), 0)::bigint AS n FROM decuwatch.class_hour_parts
			WHERE hour >= $3 AND hour < $4 AND ($1 = '' OR model = $1) AND ($2::integer IS NULL OR class_index = $2)
		), alerted AS (
			SELECT count(DISTINCT (source, event_id, model)) AS n FROM decuwatch.alerts a
			WHERE kind = 'score' AND event_time >= $3 AND event_time < $4 AND ($1 = '' OR model = $1) AND ($2::integer IS NULL OR class_index = $2)
			AND NOT EXISTS (SELECT FROM decuwatch.canaries c WHERE c.source = a.source AND c.event_id = a.event_id AND c.model = a.model)
		), reviewed AS (
			SELECT * FROM decuwatch.reviews
			WHERE event_time >= $3 AND event_time < $4 AND ($1 = '' OR model = $1) AND ($2::integer IS NULL OR class_index = $2)
		), events AS (
			SELECT bool_or(verdict IN ('confirmed', 'expected')) AS is_true FROM reviewed WHERE kind = 'alert' AND verdict IS NOT NULL GROUP BY source, event_id, model
		)
		SELECT scored.n, alerted.n,
			count(*) FILTER (WHERE kind = 'alert' AND verdict = 'confirmed'), count(*) FILTER (WHERE kind = 'alert' AND verdict = 'expected'),
			count(*) FILTER (WHERE kind = 'alert' AND verdict = 'false_alarm'), count(*) FILTER (WHERE kind = 'alert' AND verdict IS NULL),
			(SELECT count(*) FROM events WHERE is_true), (SELECT count(*) FROM events WHERE NOT is_true),
			count(*) FILTER (WHERE kind = 'sample'), count(*) FILTER (WHERE kind = 'sample' AND verdict IN ('confirmed', 'expected')),
			count(*) FILTER (WHERE kind = 'sample' AND verdict = 'false_alarm')
		FROM scored CROSS JOIN alerted LEFT JOIN reviewed ON true GROUP BY scored.n, alerted.n`, model, class, from, to).Scan(
		&t.Scored, &t.Alerted, &t.AlertsConfirmed, &t.AlertsExpected, &t.AlertsFalse, &t.AlertsOpen, &t.EventsTrue, &t.EventsFalse,
		&t.Sampled, &t.SamplesTrue, &t.SamplesFalse)
	if err != nil {
		return t, fmt.Errorf("count verdicts: %w", err)
	}
	return t, nil
}

// ScoreValues returns the newest values of a measurement (class_gap or request_risk) of one ensemble and settings, canaries left
// out: of one class, or of all classes where class is nil. At most limit of them, none older than since.
func (s *Store) ScoreValues(ctx context.Context, model, ensembleDigest, settings string, measurement schema.MeasurementName, class *int, since time.Time, limit int) ([]float64, error) {
	column := string(measurement)
	if !slices.Contains(schema.MeasurementNames(), measurement) {
		return nil, fmt.Errorf("read scores: no measurement is named %q", measurement)
	}
	rows, err := s.pool.Query(ctx, `SELECT `+column+`::double precision FROM decuwatch.scores
		WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND ($4::integer IS NULL OR class_index = $4) AND event_time >= $5 AND NOT labels ? $6
		ORDER BY event_time DESC LIMIT $7`, model, ensembleDigest, settings, class, since, schema.LabelCanary, limit)
	if err != nil {
		return nil, fmt.Errorf("read scores: %w", err)
	}
	values, err := pgx.CollectRows(rows, pgx.RowTo[float64])
	if err != nil {
		return nil, fmt.Errorf("read scores: %w", err)
	}
	return values, nil
}
