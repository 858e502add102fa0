package scoring

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Profile is the sampler and the measurements of a score.
type Profile = ensemble.Profile

// Measure is one measurement of a profile.
type Measure = ensemble.Measure

// Cascade spares the request risk of requests whose class gap is low. A [Request] has its cut.
type Cascade = ensemble.Cascade

// Diffusion says how a sampler of an ensemble chooses its timesteps.
type Diffusion = ensemble.Diffusion

// Latent is a latent of the producer.
type Latent struct {
	SHA256 string    // of the object that held it
	Step   int       // steps that the producer's sampler had taken to it, as the profile's Start says
	Values []float32 // [channels*height*width]. Validate and Rows do not need them
}

// Draw says how a generator drew the first latent.
type (
	Draw  = diffusion.Draw
	GPU   = diffusion.GPU
	Batch = diffusion.Batch
)

// LatentShape is the shape of an ensemble's latents.
type LatentShape = ensemble.Latent

// Names of the two profiles in a receipt.
const (
	ProfileFixed       = "fixed"        // the engine's: scores are comparable
	ProfileAsRequested = "as-requested" // the request's own
)

// Priority orders requests: rows of live ones enter a run before rows of background ones.
type Priority int

// The priorities.
const (
	Live       Priority = iota // a production event
	Background                 // evidence, replay, canaries, evaluation: fills the room that live requests leave
)

// Request asks for one score.
type Request struct {
	Key      string   // identity of the event, from which the carrying component is derived: source + "\n" + id
	Class    int      // index
	Seed     uint64   // of the first latent
	Noise    string   // generator of the first latent: torch-cpu, torch-cuda, decuwatch. Defaults to the ensemble's
	Draw     Draw     // how the generator drew it
	Latent   *Latent  // where the rerun begins. Defaults to the first latent that the generator draws
	Profile  Profile  // Defaults (zero value) to the engine's fixed profile
	Priority Priority // Defaults to Live
	// Cut is the class gap below which the request risk is not measured, so that its rows are free for others: a cascade.
	// In the unit of the class gap's estimator; 0 measures the request risk whatever the class gap is.
	Cut float64
}

// Result is the score of one request.
type Result struct {
	ClassGap Measurement
	// RequestRisk is nil if it was not measured; RequestRiskReason says why, ReasonBelowCut.
	RequestRisk       *Measurement
	RequestRiskReason string
	ImageRisk         *Measurement // nil if it was not measured
	ImageRiskReason   string       // why it was not: ReasonNoJudge, ReasonJudgeCannotTell or ReasonNotFinite
	Receipt           Receipt
}

// Reasons why a measurement is missing: the first for a request risk, the others for an image risk.
const (
	ReasonBelowCut        = "below_cut"         // the class gap is below the request's cut
	ReasonNoJudge         = "no_judge"          // the profile does not measure it
	ReasonJudgeCannotTell = "judge_cannot_tell" // the judge's accuracy on the class is too low, or unknown
	ReasonNotFinite       = "not_finite"        // decoder or judge gave a NaN or an infinity for this image alone
)

// ClassProbability is what a judge thinks of one class.
type ClassProbability = struct {
	Class       int
	Probability float64
}

// Measurement is one measurement of a score: of the distances between tables, or of the judge.
type Measurement struct {
	Estimator    string      // one of the estimators of package ensemble
	Value        float64     // nats for the PaiDE estimators, squared latent units for mean-w2, 1 - p for the judge
	UpperBound   float64     // ln M for the PaiDE estimators, 1 for the judge, 0 if there is no bound
	Saturated    bool        // Value is at its upper bound and no longer ranks
	MeanDistance float64     // mean of Distances over the pairs of components: cannot saturate
	Distances    [][]float64 // M x M, zero diagonal, the estimator's distance summed over dimensions
	Shares       []float64   // each component's share of the sum of Distances; sums to 1
	BranchStep   int
	RolloutSteps int
	Tables       string // set of tables, by its name in package ensemble
	Guidance     string // guidance mode
	Steps        int    // S of the sampler
	// Top are the judge's three most likely classes, most likely first; nil for other estimators.
	Top []ClassProbability
}

// Receipt is what a score can be recomputed from.
type Receipt struct {
	EnsembleDigest string   // SHA-256 of the manifest, lower-case hex
	Profile        string   // ProfileFixed or ProfileAsRequested
	Settings       string   // Profile.Settings of what ran
	Steps          int      // S of the request risk
	GuidanceScale  float64  //
	Eta            float64  //
	Seed           uint64   // of the first latent
	Noise          string   // the generator that drew the first latent
	Carrier        int      // component that carried the shared path
	Rows           int      // rows of U-Net work
	Runtime        string   // onnxruntime 1.27.0
	Device         string   // cpu, cuda:0, tensorrt:0
	Deviations     []string // set by the caller: how the rerun differs from the event
	NoiseDtype     string   // of the draw; "" means float32
	NoiseOffset    uint64   // of the generator when it drew
	SMs            int      // of the GPU that drew; 0 if unknown
	ThreadsPerSM   int      //
	BatchIndex     int      // of the image among those drawn together
	BatchSize      int      // 0 for an image drawn alone
	LatentSHA256   string   // of the event's own latent; "" if the first latent was drawn from the seed
	LatentStep     int      // steps that the producer had taken to it
	ClassImages    int      // training images of the class by the manifest's data; 0 if unknown
	ClassNEff      float64  // how many different images they are worth; 0 if unknown
	ClassDraws     int      // training examples that the producer's row was drawn for; 0 if unknown
}

// Errors of a request. Retrying will not help.
var (
	// ErrUnknownClass is returned for a class index outside the ensemble's classes.
	ErrUnknownClass = errors.New("unknown class")
	// ErrNoise is returned if the first latent cannot be drawn again: the generator is unknown, or cannot repeat the draw
	// at the latent's size.
	ErrNoise = errors.New("first latent cannot be reproduced")
	// ErrSettings is returned for a profile out of its bounds; the error names the field.
	ErrSettings = errors.New("settings out of bounds")
	// ErrTooLarge is returned for a request of more rows than Options.MaxRequestRows.
	ErrTooLarge = errors.New("request too large")
)

// ErrClosed is returned for requests that an engine could not finish before it was closed.
var ErrClosed = errors.New("scoring engine is closed")

// NonFiniteError is returned if a graph gave a NaN or an infinity.
type NonFiniteError struct {
	Graph     string // decoder or judge; "" is the backbone
	Step      int    // of the backbone's sampler, from 0
	Tables    string // set that the backbone ran
	Component int    // of the set
}

func (e *NonFiniteError) Error() string {
	switch {
	case e.Graph != "":
		return e.Graph + " output is not finite"
	case e.Tables == ensemble.TablesMembers:
		return fmt.Sprintf("backbone output is not finite at step %d, component %d", e.Step, e.Component)
	}
	return fmt.Sprintf("backbone output is not finite at step %d, table %d of %s", e.Step, e.Component, e.Tables)
}

// Carrier returns the component that carries the shared path of the event with the given key: the first eight bytes of
// the key's SHA-256, read big-endian, modulo the number of components.
func Carrier(key string, components int) int {
	sum := sha256.Sum256([]byte(key))
	return int(binary.BigEndian.Uint64(sum[:8]) % uint64(components))
}

// Tolerance and ToleranceFloor are how far two computations of one score may lie apart, relative and absolute, on one
// kind of device: the rows that share a run change the order of floating-point sums. docs/method.md has the
// measurement.
const (
	Tolerance      = 1e-3
	ToleranceFloor = 1e-6
)

// Agrees reports whether two values of one measurement are the same within the tolerance.
func Agrees(a, b float64) bool {
	return math.Abs(a-b) <= Tolerance*max(math.Abs(a), math.Abs(b))+ToleranceFloor
}
