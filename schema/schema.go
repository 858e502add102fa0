// Package schema holds the formats that others read and write: the generation event, the score, the alert.
package schema

import "time"

// Types of the CloudEvents that decuwatch reads and writes.
const (
	TypeGenerationRequested = "io.decuwatch.generation.requested.v1"
	TypeUncertaintyAlert    = "io.decuwatch.uncertainty.alert.v1"
)

// Event is one generation request of a production service: the attributes of its CloudEvent that decuwatch
// keeps, and its data. Source, ID and the model that it names identify it for ever.
type Event struct {
	Source      string    // who generated, a URI reference
	ID          string    // unique within Source
	Time        time.Time // when it was generated, UTC
	TraceParent string    // W3C trace context of the producer, or ""
	TraceState  string
	Data        Generation
}

// Identity names one event. The model is part of it: whoever may publish events of one model only cannot take the identity
// of an event of another.
type Identity struct{ Source, ID, Model string }

// Identity returns what names the event.
func (e Event) Identity() Identity { return Identity{Source: e.Source, ID: e.ID, Model: e.Data.Model} }

// Generation is the data of an event: everything that is needed to rerun the request.
type Generation struct {
	Model      string            `json:"model"`                 // name of the ensemble that stands for the production model
	Class      Class             `json:"class"`                 // index or label
	Seed       uint64            `json:"seed"`                  // of the first latent
	Noise      string            `json:"noise,omitempty"`       // how the producer drew the first latent: torch-cpu, torch-cuda, decuwatch; "" is the ensemble's default
	NoiseDtype string            `json:"noise_dtype,omitempty"` // in which the noise was drawn: float32, float16, bfloat16, float64; "" is float32
	BatchIndex *int              `json:"batch_index,omitempty"` // of the image among those drawn together from Seed; nil is an image drawn alone
	Sampler    *Sampler          `json:"sampler,omitempty"`     // what the producer ran; nil is unknown
	Labels     map[string]string `json:"labels,omitempty"`      // at most 16: tenant, region, ...
}

// Sampler is the sampler that the producer ran.
type Sampler struct {
	Name          string  `json:"name"`           // as the producer's library writes it: ddim, DDIMScheduler, Euler a
	Steps         int     `json:"steps"`          // 1 to 1000
	GuidanceScale float64 `json:"guidance_scale"` // 0 to 30
	Eta           float64 `json:"eta"`            // 0 to 1
}

// Settled is a message of a stream that has its verdict.
type Settled struct {
	Sequence uint64
	Digest   string
	At       time.Time // when the verdict was written, by the clock of the database
}

// Delivery is where an event came from: one message of one stream.
type Delivery struct {
	Stream    string
	Sequence  uint64
	Time      time.Time // when the stream stored the message, by the server's clock
	Delivered int       // 1 for the first delivery
	Digest    string    // SHA-256 of the message's payload and CloudEvents headers, lower-case hex: tells a redelivery from an identifier used twice
}

// Measurement is one pairwise-distance measurement of a score.
type Measurement struct {
	Estimator    string      `json:"estimator"`     // paide-w2, paide-kl, paide-bhattacharyya, mean-w2, pixel-paide-w2
	Value        float64     `json:"value"`         // nats for the paide estimators
	UpperBound   float64     `json:"upper_bound"`   // ln M for the paide estimators, 0 where there is none
	Saturated    bool        `json:"saturated"`     // Value is at its upper bound: decide on MeanDistance
	MeanDistance float64     `json:"mean_distance"` // mean pairwise distance, the companion that cannot saturate
	Distances    [][]float64 `json:"distances"`     // M x M, zero diagonal
	Shares       []float64   `json:"shares"`        // each component's share of the sum of distances; sums to 1
	BranchStep   int         `json:"branch_step"`
	RolloutSteps int         `json:"rollout_steps"`
}

// Receipt is what a score can be recomputed from.
type Receipt struct {
	EnsembleDigest string   `json:"ensemble_digest"` // SHA-256 of the manifest, lower-case hex
	Profile        string   `json:"profile"`         // fixed or as-requested
	Settings       string   `json:"settings"`        // canonical key of the sampler and measurement settings, to which thresholds belong
	Steps          int      `json:"steps"`
	GuidanceScale  float64  `json:"guidance_scale"`
	Eta            float64  `json:"eta"`
	Seed           uint64   `json:"seed"`
	Noise          string   `json:"noise"`                // the generator that drew the first latent
	Carrier        int      `json:"carrier"`              // component that carried the shared path, derived from the event's identity
	Rows           int      `json:"rows"`                 // rows of U-Net work
	Runtime        string   `json:"runtime"`              // onnxruntime 1.27.0
	Device         string   `json:"device"`               // cpu or cuda
	Deviations     []string `json:"deviations,omitempty"` // where the rerun could not follow the event: "sampler: euler was replaced by ddim"
}

// Score is the verdict on one event that was rerun.
type Score struct {
	Event       Event       `json:"-"`
	ClassIndex  int         `json:"class_index"`
	ClassLabel  string      `json:"class_label"`
	ClassGap    Measurement `json:"class_gap"`
	RequestRisk Measurement `json:"request_risk"`
	Receipt     Receipt     `json:"receipt"`
	ScoredAt    time.Time   `json:"scored_at"`
}

// NamedMeasurement is a measurement of a score with its name.
type NamedMeasurement struct {
	Name MeasurementName
	Measurement
}

// Measurements returns the score's measurements in the order of [MeasurementNames].
func (s *Score) Measurements() []NamedMeasurement {
	return []NamedMeasurement{{ClassGap, s.ClassGap}, {RequestRisk, s.RequestRisk}}
}

// Skip is the verdict on an event that was deliberately not scored.
type Skip struct {
	Event  Event
	Reason SkipReason // a metric's label
	Detail string
}

// DeadLetter is the verdict on a message that cannot be scored.
type DeadLetter struct {
	Event   *Event // nil where the message could not be decoded
	Source  string // CloudEvents source if Event is nil and it could be read all the same, else ""
	EventID string // CloudEvents id, likewise
	Subject string
	Payload []byte         // at most 64 KiB of it
	Field   string         // the field that is wrong, or ""
	Reason  string         // what is wrong and the bound, for the producer
	Kind    DeadLetterKind // a metric's label
}

// Verdict is what becomes of one delivered message: exactly one of Score, Skip and DeadLetter is set.
type Verdict struct {
	Delivery   Delivery
	Score      *Score
	Alerts     []Alert // with a score only; written in its transaction
	Sampled    bool    // with a score without alerts only: it enters review unmarked, so that recall can be estimated
	Skip       *Skip
	DeadLetter *DeadLetter
}

// Tries are the attempts on one message that did not come to a verdict.
type Tries struct {
	Failed     int // ended with an error
	HandedBack int // given up because the worker was stopped
	Watched    int // began among few others and did not end: the worker ended without a word
	Alone      int // began alone in the worker and did not end, likewise
}

// Threshold is one bound on one measurement.
type Threshold struct {
	ID             int64           `json:"id"`
	Model          string          `json:"model"`
	EnsembleDigest string          `json:"ensemble_digest"`
	Settings       string          `json:"settings"` // Receipt.Settings
	Measurement    MeasurementName `json:"measurement"`
	Scope          Scope           `json:"scope"`
	Class          *int            `json:"class,omitempty"` // for the scopes class and cluster
	Severity       Severity        `json:"severity"`
	Value          float64         `json:"value"`               // the measurement's value at which an alert fires
	Distance       *float64        `json:"distance,omitempty"`  // decides instead, on MeanDistance, where the measurement is saturated
	Withdrawn      bool            `json:"withdrawn,omitempty"` // the key has no threshold from here on
	Origin         string          `json:"origin"`              // manual, calibrated, reference
	N              int             `json:"n"`                   // scores it was calibrated from
	Alpha          *float64        `json:"alpha,omitempty"`     // false-alarm rate that was wished for
	Achieved       *float64        `json:"achieved,omitempty"`  // false-alarm rate that was achieved
	WindowFrom     *time.Time      `json:"window_from,omitempty"`
	WindowTo       *time.Time      `json:"window_to,omitempty"`
	SetBy          string          `json:"set_by"`
	Reason         string          `json:"reason"`
	SetAt          time.Time       `json:"set_at"`
}

// Sample is one measurement of a stored score, as calibrations and drift references read it.
type Sample struct {
	Class     int
	Value     float64
	Distance  float64 // mean pairwise distance
	Saturated bool
}

// Alert is the data of an alert event: what fired, where the score stands, and the receipt.
type Alert struct {
	ID          string            `json:"id"` // derived from the event's identity, the ensemble digest and the measurement: the same on every try
	Kind        AlertKind         `json:"kind"`
	Source      string            `json:"source"` // of the event
	EventID     string            `json:"event_id"`
	EventTime   time.Time         `json:"event_time"`
	Model       string            `json:"model"`
	ClassIndex  int               `json:"class_index"`
	ClassLabel  string            `json:"class_label"`
	Labels      map[string]string `json:"labels,omitempty"`
	Severity    Severity          `json:"severity"`
	Reason      Reason            `json:"reason"` // why it fired, a metric's label
	Measurement MeasurementName   `json:"measurement"`
	Value       float64           `json:"value"`
	Decided     float64           `json:"decided"`   // the number that was compared: Value, or MeanDistance where saturated
	Threshold   float64           `json:"threshold"` // the number it was compared with
	ThresholdID int64             `json:"threshold_id"`
	Saturated   bool              `json:"saturated"`
	ClassGap    float64           `json:"class_gap"`
	RequestRisk float64           `json:"request_risk"`
	Receipt     Receipt           `json:"receipt"`
	Count       int               `json:"count,omitempty"`  // alerts that a summary stands for
	Detail      string            `json:"detail,omitempty"` // more, in words
	FiredAt     time.Time         `json:"fired_at"`
	TraceParent string            `json:"-"` // W3C trace context of the event, an attribute and a header of the alert's message; "" where there is none
}
