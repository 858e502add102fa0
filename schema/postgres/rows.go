package postgres

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// Rows travel to and from the database as JSON, by column name: json_populate_recordset makes many rows of one
// parameter, with arrays inside, which unnest of parallel arrays cannot carry; row_to_json brings them back. Numbers
// survive exactly, both sides writing the shortest text that reads back the same.

// eventRow is a row of events.
type eventRow struct {
	Source         string         `json:"source"`
	EventID        string         `json:"event_id"`
	Digest         string         `json:"digest"`
	Outcome        schema.Outcome `json:"outcome"`
	Reason         string         `json:"reason"`
	EventTime      time.Time      `json:"event_time"`
	Model          string         `json:"model"`
	EnsembleDigest *string        `json:"ensemble_digest"`
	Stream         string         `json:"stream"`
	Sequence       int64          `json:"sequence"`
	Delivered      int            `json:"delivered"`
}

// identity returns what names the row's event.
func (r *eventRow) identity() schema.Identity {
	return schema.Identity{Source: r.Source, ID: r.EventID, Model: r.Model}
}

// repeatRow is a row of repeats.
type repeatRow struct {
	Stream    string `json:"stream"`
	Sequence  int64  `json:"sequence"`
	Digest    string `json:"digest"`
	Source    string `json:"source"`
	EventID   string `json:"event_id"`
	Model     string `json:"model"`
	Delivered int    `json:"delivered"`
}

// requested is the column scores.requested.
type requested struct {
	Class      schema.Class    `json:"class"`
	Noise      string          `json:"noise,omitempty"`
	NoiseDtype string          `json:"noise_dtype,omitempty"`
	BatchIndex *int            `json:"batch_index,omitempty"`
	Sampler    *schema.Sampler `json:"sampler,omitempty"`

	NoiseOffset uint64      `json:"noise_offset,omitempty"`
	GPU         *schema.GPU `json:"gpu,omitempty"`
	BatchSize   int         `json:"batch_size,omitempty"`

	Latent *schema.Latent `json:"latent,omitempty"`
}

// firstLatent is the column scores.first_latent: how the receipt's first latent was drawn, or whose it was. NULL is a
// draw of float32 for one image, by a generator that was just seeded.
type firstLatent struct {
	NoiseDtype   string `json:"noise_dtype,omitempty"`
	NoiseOffset  uint64 `json:"noise_offset,omitempty"`
	SMs          int    `json:"sms,omitempty"`
	ThreadsPerSM int    `json:"threads_per_sm,omitempty"`
	BatchIndex   int    `json:"batch_index,omitempty"`
	BatchSize    int    `json:"batch_size,omitempty"`
	LatentSHA256 string `json:"latent_sha256,omitempty"`
	LatentStep   int    `json:"latent_step,omitempty"`
}

// scoreRow is a row of scores.
type scoreRow struct {
	EventTime      time.Time `json:"event_time"`
	Source         string    `json:"source"`
	EventID        string    `json:"event_id"`
	EnsembleDigest string    `json:"ensemble_digest"`
	Model          string    `json:"model"`
	Settings       string    `json:"settings"`
	ClassIndex     int       `json:"class_index"`
	ClassLabel     string    `json:"class_label"`

	Profile       string            `json:"profile"`
	Steps         int               `json:"steps"`
	GuidanceScale float64           `json:"guidance_scale"`
	Eta           float64           `json:"eta"`
	Seed          uint64            `json:"seed"`
	Noise         string            `json:"noise"`
	Carrier       int               `json:"carrier"`
	UNetRows      int               `json:"unet_rows"`
	Runtime       string            `json:"runtime"`
	Device        string            `json:"device"`
	Deviations    []string          `json:"deviations"`
	Labels        map[string]string `json:"labels"`
	Requested     requested         `json:"requested"`
	TraceParent   *string           `json:"trace_parent"`
	TraceState    *string           `json:"trace_state"`
	ScoredAt      time.Time         `json:"scored_at"`
	ClassImages   int               `json:"class_images"`
	ClassNEff     float64           `json:"class_n_eff"`
	ClassDraws    int               `json:"class_draws"`
	FirstLatent   *firstLatent      `json:"first_latent"`

	InclusionProbability float64 `json:"inclusion_probability"`

	RequestRiskReason      *schema.UnmeasuredReason `json:"request_risk_reason"`
	RequestRiskProbability float64                  `json:"request_risk_probability"`
	ImageRiskReason        *schema.UnmeasuredReason `json:"image_risk_reason"`

	measured map[schema.MeasurementName]*schema.Measurement // in columns of their own, see stored
}

func newScoreRow(s *schema.Score) scoreRow {
	e, d, receipt := s.Event, s.Event.Data, s.Receipt
	row := scoreRow{
		EventTime: e.Time, Source: e.Source, EventID: e.ID, EnsembleDigest: receipt.EnsembleDigest,
		Model: d.Model, Settings: receipt.Settings, ClassIndex: s.ClassIndex, ClassLabel: s.ClassLabel,

		Profile: receipt.Profile, Steps: receipt.Steps, GuidanceScale: receipt.GuidanceScale, Eta: receipt.Eta,
		Seed: receipt.Seed, Noise: receipt.Noise, Carrier: receipt.Carrier, UNetRows: receipt.Rows,
		Runtime: receipt.Runtime, Device: receipt.Device, Deviations: notNil(receipt.Deviations),
		Labels: labels(d.Labels), Requested: newRequested(d), FirstLatent: newFirstLatent(receipt),
		TraceParent: optional(e.TraceParent), TraceState: optional(e.TraceState), ScoredAt: s.ScoredAt,
		ClassImages: receipt.ClassImages, ClassNEff: receipt.ClassNEff, ClassDraws: receipt.ClassDraws,
		RequestRiskReason: optional(s.RequestRiskReason), RequestRiskProbability: s.RequestRiskProbability,
		InclusionProbability: cmp.Or(s.InclusionProbability, 1), ImageRiskReason: optional(s.ImageRiskReason),
		measured: map[schema.MeasurementName]*schema.Measurement{},
	}
	if s.RequestRisk != nil {
		row.RequestRiskProbability = cmp.Or(s.RequestRiskProbability, 1)
	}
	for _, m := range s.Measurements() {
		row.measured[m.Name] = &m.Measurement
	}
	return row
}

func newRequested(d schema.Generation) requested {
	return requested{
		Class: d.Class, Noise: d.Noise, NoiseDtype: d.NoiseDtype, BatchIndex: d.BatchIndex, Sampler: d.Sampler,
		NoiseOffset: d.NoiseOffset, GPU: d.GPU, BatchSize: d.BatchSize, Latent: d.Latent,
	}
}

func newFirstLatent(r schema.Receipt) *firstLatent {
	f := firstLatent{
		NoiseDtype: r.NoiseDtype, NoiseOffset: r.NoiseOffset, SMs: r.SMs, ThreadsPerSM: r.ThreadsPerSM,
		BatchIndex: r.BatchIndex, BatchSize: r.BatchSize, LatentSHA256: r.LatentSHA256, LatentStep: r.LatentStep,
	}
	if f == (firstLatent{}) {
		return nil
	}
	return &f
}

// tell notes in a receipt what the column says.
func (f *firstLatent) tell(r *schema.Receipt) {
	if f == nil {
		return
	}
	r.NoiseDtype, r.NoiseOffset, r.SMs, r.ThreadsPerSM = f.NoiseDtype, f.NoiseOffset, f.SMs, f.ThreadsPerSM
	r.BatchIndex, r.BatchSize, r.LatentSHA256, r.LatentStep = f.BatchIndex, f.BatchSize, f.LatentSHA256, f.LatentStep
}

func (r scoreRow) score() *schema.Score {
	s := &schema.Score{
		Event: schema.Event{
			Source: r.Source, ID: r.EventID, Time: r.EventTime.UTC(),
			TraceParent: text(r.TraceParent), TraceState: text(r.TraceState),
			Data: schema.Generation{
				Model: r.Model, Class: r.Requested.Class, Seed: r.Seed, Noise: r.Requested.Noise,
				NoiseDtype: r.Requested.NoiseDtype, BatchIndex: r.Requested.BatchIndex, Sampler: r.Requested.Sampler,
				NoiseOffset: r.Requested.NoiseOffset, GPU: r.Requested.GPU, BatchSize: r.Requested.BatchSize,
				Latent: r.Requested.Latent,
				Labels: nilIfEmpty(r.Labels),
			},
		},
		ClassIndex: r.ClassIndex, ClassLabel: r.ClassLabel,
		Receipt: schema.Receipt{
			EnsembleDigest: r.EnsembleDigest, Profile: r.Profile, Settings: r.Settings, Steps: r.Steps,
			GuidanceScale: r.GuidanceScale, Eta: r.Eta, Seed: r.Seed, Noise: r.Noise, Carrier: r.Carrier,
			Rows: r.UNetRows, Runtime: r.Runtime, Device: r.Device, Deviations: nilIfNone(r.Deviations),
			ClassImages: r.ClassImages, ClassNEff: r.ClassNEff, ClassDraws: r.ClassDraws,
		},
		ScoredAt: r.ScoredAt.UTC(), RequestRiskProbability: r.RequestRiskProbability,
	}
	r.FirstLatent.tell(&s.Receipt)
	if r.InclusionProbability < 1 {
		s.InclusionProbability = r.InclusionProbability
	}
	s.RequestRiskReason, s.ImageRiskReason = text(r.RequestRiskReason), text(r.ImageRiskReason)
	for name, m := range r.measured {
		s.SetMeasurement(name, *m)
	}
	return s
}

// probability returns how likely a measurement of the event was to be made.
func (r *scoreRow) probability(name schema.MeasurementName) float64 {
	if name == schema.RequestRisk {
		return r.InclusionProbability * r.RequestRiskProbability
	}
	return r.InclusionProbability
}

// checkScore names the first number of a score that is not finite.
func checkScore(s *schema.Score) error {
	for _, m := range s.Measurements() {
		numbers := append([]float64{m.Value, m.UpperBound, m.MeanDistance}, m.Shares...)
		for _, row := range m.Distances {
			numbers = append(numbers, row...)
		}
		for _, c := range m.Top {
			numbers = append(numbers, c.Probability)
		}
		for _, x := range numbers {
			if !finite(x) {
				return fmt.Errorf("%s holds %g: %w", m.Name, x, ErrNotFinite)
			}
		}
	}
	if !finite(s.RequestRiskProbability) {
		return fmt.Errorf("request_risk_probability: %w", ErrNotFinite)
	}
	if !finite(s.InclusionProbability) {
		return fmt.Errorf("inclusion probability: %w", ErrNotFinite)
	}
	if !finite(s.Receipt.GuidanceScale) || !finite(s.Receipt.Eta) || !finite(s.Receipt.ClassNEff) {
		return fmt.Errorf("receipt: %w", ErrNotFinite)
	}
	return nil
}

func checkAlert(a schema.Alert) error {
	numbers := []float64{a.Value, a.Decided, a.Threshold, a.ClassGap}
	for _, risk := range []*float64{a.RequestRisk, a.ImageRisk} {
		if risk != nil {
			numbers = append(numbers, *risk)
		}
	}
	for _, x := range numbers {
		if !finite(x) {
			return fmt.Errorf("alert %s holds %g: %w", a.ID, x, ErrNotFinite)
		}
	}
	return nil
}

func finite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }

// skipRow is a row of skips.
type skipRow struct {
	Source    string            `json:"source"`
	EventID   string            `json:"event_id"`
	EventTime time.Time         `json:"event_time"`
	Model     string            `json:"model"`
	Class     string            `json:"class"`
	Reason    schema.SkipReason `json:"reason"`
	Detail    string            `json:"detail"`
	Labels    map[string]string `json:"labels"`

	InclusionProbability *float64 `json:"inclusion_probability"`
}

// deadLetterRow is a row of dead_letters.
type deadLetterRow struct {
	Stream    string                `json:"stream"`
	Sequence  int64                 `json:"sequence"`
	Digest    string                `json:"digest"`
	Delivered int                   `json:"delivered"`
	Source    *string               `json:"source"`
	EventID   *string               `json:"event_id"`
	EventTime *time.Time            `json:"event_time"`
	Model     *string               `json:"model"`
	Subject   string                `json:"subject"`
	Payload   bytea                 `json:"payload"`
	Kind      schema.DeadLetterKind `json:"kind"`
	Field     string                `json:"field"`
	Reason    string                `json:"reason"`

	PayloadSize  int    `json:"payload_size"`
	PayloadState string `json:"payload_state"`
}

// ours reports whether the message itself may be fine: its producer is not at fault.
func (r *deadLetterRow) ours() bool {
	return r.Kind == schema.KindFailed || r.Kind == schema.KindGivenUp || r.Kind == schema.KindOrphaned
}

// How much of a dead letter's payload is kept, until it expires.
const (
	payloadWhole = "whole"
	payloadCut   = "cut"
)

// alertRow is a row of alerts as it is inserted. An alert's JSON leaves out what is empty, a row does not.
type alertRow struct {
	schema.Alert
	Labels         map[string]string `json:"labels"`
	Count          int               `json:"count"`
	Detail         string            `json:"detail"`
	EnsembleDigest string            `json:"ensemble_digest"`
	Settings       string            `json:"settings"`
	Delivery       schema.Dispatch   `json:"delivery"`
	SilenceID      *int64            `json:"silence_id"`
}

func newAlertRow(a schema.Alert) alertRow {
	return alertRow{
		a, labels(a.Labels), a.Count, a.Detail, a.Receipt.EnsembleDigest, a.Receipt.Settings, schema.DispatchOwed, nil,
	}
}

// listAlerts returns the alerts that a query selects, each as JSON.
func listAlerts(ctx context.Context, q querier, sql string, args ...any) ([]schema.Alert, error) {
	alerts, err := list(ctx, q, pgx.RowTo[schema.Alert], sql, args...)
	for i := range alerts {
		a := &alerts[i]
		a.EventTime, a.FiredAt, a.Labels = a.EventTime.UTC(), a.FiredAt.UTC(), nilIfEmpty(a.Labels)
	}
	return alerts, err
}

// outboxRow is a row of outbox.
type outboxRow struct {
	Sink      schema.Sink         `json:"sink"`
	MessageID string              `json:"message_id"`
	Subject   string              `json:"subject"`
	Headers   map[string][]string `json:"headers"`
	Body      bytea               `json:"body"`
}

// outboxRows returns what is owed to sinks for an alert.
func outboxRows(a schema.Alert, sinks ...schema.Sink) ([]outboxRow, error) {
	header, body, err := schema.EncodeAlert(a)
	if err != nil {
		return nil, err
	}
	rows := make([]outboxRow, len(sinks))
	for i, sink := range sinks {
		rows[i] = outboxRow{sink, a.ID, schema.AlertSubject(a), header, body}
	}
	return rows, nil
}

// reviewRow is a row of reviews as it is opened.
type reviewRow struct {
	ID             string    `json:"id"`
	Kind           string    `json:"kind"`
	AlertID        *string   `json:"alert_id"`
	Source         string    `json:"source"`
	EventID        string    `json:"event_id"`
	EventTime      time.Time `json:"event_time"`
	Model          string    `json:"model"`
	EnsembleDigest string    `json:"ensemble_digest"`
	ClassIndex     int       `json:"class_index"`
	ClassLabel     string    `json:"class_label"`

	Labels   map[string]string                  `json:"labels"`
	Measured map[schema.MeasurementName]float64 `json:"measured"`
}

// newReviewRow returns the review of a score: of its most severe alert, or of a request that was drawn at random if
// there is none.
func newReviewRow(s *schema.Score, alerts []schema.Alert) reviewRow {
	e := s.Event
	r := reviewRow{
		ID: SampleID(e.Identity()), Kind: ReviewSample, Source: e.Source, EventID: e.ID, EventTime: e.Time,
		Model: e.Data.Model, EnsembleDigest: s.Receipt.EnsembleDigest, ClassIndex: s.ClassIndex, ClassLabel: s.ClassLabel,
		Labels: labels(e.Data.Labels), Measured: map[schema.MeasurementName]float64{},
	}
	for _, m := range s.Measurements() {
		r.Measured[m.Name] = m.Value
	}
	if len(alerts) > 0 {
		worst := slices.MaxFunc(alerts, func(a, b schema.Alert) int { return a.Severity.Compare(b.Severity) })
		r.ID, r.Kind, r.AlertID = worst.ID, ReviewAlert, &worst.ID
	}
	return r
}

// bytea is a byte string in PostgreSQL's hex format.
type bytea []byte

// MarshalJSON writes "\\x…".
func (b bytea) MarshalJSON() ([]byte, error) { return json.Marshal(fmt.Sprintf(`\x%x`, []byte(b))) }

func notNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func nilIfNone[T any](list []T) []T {
	if len(list) == 0 {
		return nil
	}
	return list
}

func nilIfEmpty(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return m
}

func labels(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func optional[T ~string](s T) *T {
	if s == "" {
		return nil
	}
	return &s
}

func text[T ~string](s *T) T {
	if s == nil {
		return ""
	}
	return *s
}
