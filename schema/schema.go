// Package schema holds the formats that others read and write: the generation event, the score, the alert.
package schema

import (
	"cmp"
	"time"
)

// Types of the CloudEvents that decuwatch reads and writes.
const (
	TypeGenerationRequested = "io.decuwatch.generation.requested.v1"
	TypeUncertaintyAlert    = "io.decuwatch.uncertainty.alert.v1"
)

// CanarySource is the CloudEvents source of canaries: events that must raise an alert.
const CanarySource = "/decuwatch/canary"

// Event is one generation request of a production service: the attributes of its CloudEvent that decuwatch
// keeps, and its data. Source, ID and model identify it.
type Event struct {
	Source      string    // who generated, a URI reference
	ID          string    // unique within Source
	Time        time.Time // when it was generated, UTC
	TraceParent string    // W3C trace context of the producer, or ""
	TraceState  string
	Data        Generation
}

// Identity names one event. The model is part of it, so that a publisher of one model cannot take the identities of
// another model's events.
type Identity struct{ Source, ID, Model string }

// Identity returns the event's identity.
func (e Event) Identity() Identity { return Identity{Source: e.Source, ID: e.ID, Model: e.Data.Model} }

// Generation is the data of an event: everything that is needed to rerun the request.
type Generation struct {
	Model string `json:"model"` // name of the ensemble that stands for the production model
	Class Class  `json:"class"` // index or label
	Seed  uint64 `json:"seed"`  // of the first latent

	// Noise is the generator of the first latent: torch-cpu, torch-cuda or decuwatch; "" means the ensemble's default.
	Noise string `json:"noise,omitempty"`
	// NoiseDtype is the type of the noise as it was drawn: float32, float16, bfloat16 or float64; "" means float32.
	NoiseDtype string `json:"noise_dtype,omitempty"`
	// NoiseOffset is the offset of a torch-cuda generator when the noise was drawn; 0 means just seeded.
	NoiseOffset uint64 `json:"noise_offset,omitempty"`
	GPU         *GPU   `json:"gpu,omitempty"` // that drew the noise, of torch-cuda; nil means unknown
	// BatchIndex is the index of the image in the batch that was drawn from Seed; nil means drawn alone.
	BatchIndex *int `json:"batch_index,omitempty"`
	BatchSize  int  `json:"batch_size,omitempty"` // images that were drawn together; 0 means unknown

	Latent  *Latent           `json:"latent,omitempty"`  // of the producer; nil means drawn from Seed
	Sampler *Sampler          `json:"sampler,omitempty"` // what the producer ran; nil means unknown
	Labels  map[string]string `json:"labels,omitempty"`  // at most 16: tenant, region, ...
}

// GPU is what the order of torch-cuda's numbers depends on.
type GPU struct {
	SMs          int `json:"sms"`            // streaming multiprocessors, 1 to 4096
	ThreadsPerSM int `json:"threads_per_sm"` // that are resident at most, 256 to 8192
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

// Delivery says which message of which stream an event came from.
type Delivery struct {
	Stream    string
	Sequence  uint64
	Time      time.Time // when the stream stored the message, by the server's clock
	Delivered int       // 1 for the first delivery
	Digest    string    // see [Digest]
}

// Measurement is one measurement of a score: of the distances between tables, or of the judge.
type Measurement struct {
	Estimator    string      `json:"estimator"`     // paide-w2, paide-kl, paide-bhattacharyya, mean-w2, judge, ...
	Value        float64     `json:"value"`         // nats for the paide estimators, 1 - probability for the judge
	UpperBound   float64     `json:"upper_bound"`   // ln M for the paide estimators, 1 for the judge, 0 without a bound
	Saturated    bool        `json:"saturated"`     // Value is at its upper bound, so MeanDistance decides
	MeanDistance float64     `json:"mean_distance"` // mean pairwise distance, the companion that cannot saturate
	Distances    [][]float64 `json:"distances"`     // M x M, zero diagonal
	Shares       []float64   `json:"shares"`        // each component's share of the sum of distances; sums to 1
	BranchStep   int         `json:"branch_step"`
	RolloutSteps int         `json:"rollout_steps"`
	Tables       string      `json:"tables"`   // members, posterior, producer
	Guidance     string      `json:"guidance"` // own or shared
	Steps        int         `json:"steps"`    // of the sampler
	// Top are the judge's three most likely classes, most likely first; only of an image risk.
	Top []ClassProbability `json:"top,omitempty"`
}

// ClassProbability is what a judge thinks of one class.
type ClassProbability = struct {
	Class       int     `json:"class"`
	Probability float64 `json:"probability"`
}

// Receipt is what a score can be recomputed from.
type Receipt struct {
	EnsembleDigest string   `json:"ensemble_digest"` // SHA-256 of the manifest, lower-case hex
	Profile        string   `json:"profile"`         // fixed or as-requested
	Settings       string   `json:"settings"`        // canonical key of the settings of sampler and measurements
	Steps          int      `json:"steps"`           // of the request risk
	GuidanceScale  float64  `json:"guidance_scale"`
	Eta            float64  `json:"eta"`
	Seed           uint64   `json:"seed"`
	Noise          string   `json:"noise"`                // the generator that drew the first latent
	Carrier        int      `json:"carrier"`              // component of the shared path, by the event's identity
	Rows           int      `json:"rows"`                 // rows of U-Net work
	Runtime        string   `json:"runtime"`              // onnxruntime 1.27.0
	Device         string   `json:"device"`               // cpu or cuda
	Deviations     []string `json:"deviations,omitempty"` // "sampler: euler was replaced by ddim"

	// How the generator drew the first latent. What is left out is a draw of float32 for one image, by a generator that
	// was just seeded.
	NoiseDtype   string `json:"noise_dtype,omitempty"`
	NoiseOffset  uint64 `json:"noise_offset,omitempty"`
	SMs          int    `json:"sms,omitempty"` // of the GPU that drew it
	ThreadsPerSM int    `json:"threads_per_sm,omitempty"`
	BatchIndex   int    `json:"batch_index,omitempty"`
	BatchSize    int    `json:"batch_size,omitempty"`
	// The event's own latent, if it was rerun from there: its SHA-256, and how many steps the producer had taken.
	LatentSHA256 string `json:"latent_sha256,omitempty"`
	LatentStep   int    `json:"latent_step,omitempty"`

	// What is known of the class's training data, on which the class gap stands; left out if unknown.
	ClassImages int     `json:"class_images,omitempty"` // training images
	ClassNEff   float64 `json:"class_n_eff,omitempty"`  // how many different images they are worth
	ClassDraws  int     `json:"class_draws,omitempty"`  // training examples that the producer's row was drawn for
}

// Score is the verdict on one event that was rerun.
type Score struct {
	Event      Event       `json:"-"`
	ClassIndex int         `json:"class_index"`
	ClassLabel string      `json:"class_label"`
	ClassGap   Measurement `json:"class_gap"`
	// RequestRisk is nil if it was not measured. RequestRiskReason says why.
	RequestRisk       *Measurement     `json:"request_risk"`
	RequestRiskReason UnmeasuredReason `json:"request_risk_reason,omitempty"`
	// RequestRiskProbability is the probability with which the request risk was to be measured, given the class gap: 1
	// without a cascade. 0 means 1 if it was measured.
	RequestRiskProbability float64 `json:"request_risk_probability"`
	// ImageRisk is nil if it was not measured. ImageRiskReason says why.
	ImageRisk       *Measurement     `json:"image_risk"`
	ImageRiskReason UnmeasuredReason `json:"image_risk_reason,omitempty"`
	Receipt         Receipt          `json:"receipt"`
	ScoredAt        time.Time        `json:"scored_at"`
	// InclusionProbability is the probability, above 0, with which the event was selected for scoring. 0 means 1: every
	// event like it is scored. Estimates over traffic weigh a score by its inverse.
	InclusionProbability float64 `json:"inclusion_probability,omitempty"`
}

// Rescore is a score of an event beside its verdict.
type Rescore struct {
	Score   *Score
	Purpose Purpose // shadow or rescore
	Alerts  []Alert // written in its transaction
}

// NamedMeasurement is a measurement of a score with its name.
type NamedMeasurement struct {
	Name MeasurementName
	Measurement
}

// Measurements returns what the score measured, in the order of [MeasurementNames].
func (s *Score) Measurements() []NamedMeasurement {
	list := []NamedMeasurement{{ClassGap, s.ClassGap}}
	if s.RequestRisk != nil {
		list = append(list, NamedMeasurement{RequestRisk, *s.RequestRisk})
	}
	if s.ImageRisk != nil {
		list = append(list, NamedMeasurement{ImageRisk, *s.ImageRisk})
	}
	return list
}

// NamedReason is why a score lacks a measurement.
type NamedReason struct {
	Name   MeasurementName
	Reason UnmeasuredReason // empty if nobody knows why
}

// Unmeasured returns what the score did not measure, in the order of [MeasurementNames].
func (s *Score) Unmeasured() []NamedReason {
	var list []NamedReason
	if s.RequestRisk == nil {
		list = append(list, NamedReason{RequestRisk, s.RequestRiskReason})
	}
	if s.ImageRisk == nil {
		list = append(list, NamedReason{ImageRisk, s.ImageRiskReason})
	}
	return list
}

// Skip is the verdict on an event that was left out on purpose.
type Skip struct {
	Event  Event
	Reason SkipReason // a metric's label
	Detail string
	// InclusionProbability is the probability with which the event would have been scored, if a lot decided. Otherwise
	// it is nil.
	InclusionProbability *float64
}

// DeadLetter is the verdict on a message that cannot be scored.
type DeadLetter struct {
	Event   *Event // nil if the message could not be decoded
	Source  string // CloudEvents source if Event is nil but the source could be read, else ""
	EventID string // CloudEvents id if Event is nil but the id could be read, else ""
	Subject string
	Payload []byte         // its first 64 KiB
	Field   string         // the field that is wrong, or ""
	Reason  string         // what is wrong and the bound, for the producer
	Kind    DeadLetterKind // a metric's label
}

// Verdict is the result for one delivered message: exactly one of Score, Skip and DeadLetter is set.
type Verdict struct {
	Delivery   Delivery
	Score      *Score
	Alerts     []Alert // of a score only; written in its transaction
	Sampled    bool    // of a score without alerts only: it enters review as a random sample
	Skip       *Skip
	DeadLetter *DeadLetter
}

// Tries counts the attempts on one message that ended without a verdict.
type Tries struct {
	Failed     int // ended with an error
	HandedBack int // handed back because the worker was stopped
	Watched    int // began among few others, and the worker crashed
	Alone      int // began alone in its worker, and the worker crashed
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
	Distance       *float64        `json:"distance,omitempty"`  // bound on MeanDistance, for saturated measurements
	Withdrawn      bool            `json:"withdrawn,omitempty"` // removes the threshold of its key
	Origin         string          `json:"origin"`              // manual, calibrated, reference
	N              int             `json:"n"`                   // scores it was calibrated from
	Alpha          *float64        `json:"alpha,omitempty"`     // wanted false-alarm rate
	Achieved       *float64        `json:"achieved,omitempty"`  // achieved false-alarm rate
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
	Weight    float64 // see Requests; 0 means 1
}

// Requests returns how many requests of the traffic the sample stands for: the inverse of its probability of being
// measured.
func (s Sample) Requests() float64 { return cmp.Or(s.Weight, 1) }

// Alert is the data of an alert event: what fired, the score's numbers, and the receipt.
type Alert struct {
	ID          string            `json:"id"` // the same on every try
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
	Decided     float64           `json:"decided"`   // the number that was compared: Value, or MeanDistance if saturated
	Threshold   float64           `json:"threshold"` // the number it was compared with
	ThresholdID int64             `json:"threshold_id"`
	Saturated   bool              `json:"saturated"`
	ClassGap    float64           `json:"class_gap"`
	RequestRisk *float64          `json:"request_risk"` // nil if it was not measured
	ImageRisk   *float64          `json:"image_risk"`   // nil if it was not measured
	Receipt     Receipt           `json:"receipt"`
	Count       int               `json:"count,omitempty"`  // alerts that a summary stands for
	Detail      string            `json:"detail,omitempty"` // more, in words
	FiredAt     time.Time         `json:"fired_at"`
	TraceParent string            `json:"-"` // W3C trace context of the event, or ""
}
