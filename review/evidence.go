package review

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor/replay"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Gatherer reruns a request for its evidence, behind live work: a *scoring.Engine.
type Gatherer interface {
	Evidence(ctx context.Context, r scoring.Request) (scoring.Evidence, error)
	ClassImages(ctx context.Context, class, n int) ([][]float32, error)
	Ensemble() *ensemble.Ensemble
}

// Jobs holds owed and finished evidence: a *postgres.Store.
type Jobs interface {
	NextEvidence(ctx context.Context, ensembleDigests []string, lease time.Duration) (postgres.EvidenceJob, bool, error)
	StoreEvidence(ctx context.Context, job postgres.EvidenceJob, files []postgres.EvidenceFile) (bool, error)
	FailEvidence(ctx context.Context, job postgres.EvidenceJob, reason string, wait time.Duration, final bool) error
	ReturnEvidence(ctx context.Context, job postgres.EvidenceJob) error
	EvidenceStats(ctx context.Context) (postgres.EvidenceStats, error)
	Listen(ctx context.Context, channel string, notify func()) error
}

// WorkerConfig is the configuration of a [Worker]. Fields with a name are settings.
type WorkerConfig struct {
	// Maximum requests that are rerun for evidence at a time, behind live work; 0 leaves evidence to other processes.
	Workers int `name:"workers" default:"1" min:"0" max:"64"`
	// Maximum attempts to make the evidence of one request.
	MaxAttempts int `name:"evidence-attempts" default:"4" min:"1"`
	// Longer side of a stored image in pixels, 16 to 512; larger ones are scaled down.
	ImageSide int `name:"image-side" default:"512" min:"16" max:"512"`

	Lease      time.Duration `kong:"-" default:"5m" min:"1s"`  // longest time of one attempt
	RetryDelay time.Duration `kong:"-" default:"10s" min:"0s"` // after the first failed attempt; then it doubles
	Poll       time.Duration `kong:"-" default:"5s" min:"0s"`  // interval of looking for jobs that were not announced

	Latents    replay.Latents        `kong:"-"` // of events; nil makes no evidence of scores that need one
	Registerer prometheus.Registerer `kong:"-"`
	Log        *slog.Logger          `kong:"-"` // Defaults to slog.Default()
}

// Check returns an error that names the settings out of their bounds.
func (c WorkerConfig) Check() error { return settings.Check("review", c) }

// Worker makes the evidence that is owed to reviews. Several processes may run one on the same database: no job is done
// twice.
type Worker struct {
	config  WorkerConfig
	jobs    Jobs
	engines map[string]Gatherer // by ensemble digest
	metrics *metrics
	wake    chan struct{}

	known      sync.Mutex
	references map[classKey][]postgres.EvidenceFile
}

// NewWorker returns a worker that reruns requests on the engines. It fails if a number of the configuration is out
// of its bounds or its metrics are registered already.
func NewWorker(jobs Jobs, engines []Gatherer, c WorkerConfig) (*Worker, error) {
	c = settings.WithDefaults(c)
	c.Log = cmp.Or(c.Log, slog.Default())
	if err := c.Check(); err != nil {
		return nil, err
	}
	w := &Worker{
		config: c, jobs: jobs, engines: map[string]Gatherer{}, metrics: newMetrics(c.Registerer),
		wake: make(chan struct{}, 1), references: map[classKey][]postgres.EvidenceFile{},
	}
	for _, e := range engines {
		w.engines[e.Ensemble().Digest] = e
	}
	return w, nil
}

// Run works until ctx ends and returns nil. An attempt that is under way then is broken off and made again by the next
// process.
func (w *Worker) Run(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.jobs.Listen(ctx, postgres.ChannelReviews, func() { // returns when ctx ends
			select {
			case w.wake <- struct{}{}:
			default:
			}
		})
	}()
	running := make(chan struct{})
	for range w.config.Workers {
		go func() {
			defer func() { running <- struct{}{} }()
			w.work(ctx)
		}()
	}
	for range w.config.Workers {
		<-running
	}
	<-done
	return nil
}

func (w *Worker) work(ctx context.Context) {
	digests := slices.Sorted(maps.Keys(w.engines))
	for ctx.Err() == nil {
		found, err := w.once(ctx, digests)
		if err != nil && ctx.Err() == nil {
			w.config.Log.Warn("evidence jobs are not available", "err", err)
		}
		if found && err == nil {
			continue
		}
		w.measure(ctx)
		timer := time.NewTimer(w.config.Poll)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-w.wake:
		}
		timer.Stop()
	}
}

// margin is what is left of a lease for storing what was made.
const margin = 5

// once does one job; false if no job is due.
func (w *Worker) once(ctx context.Context, digests []string) (bool, error) {
	job, found, err := w.jobs.NextEvidence(ctx, digests, w.config.Lease)
	if !found || err != nil {
		return found, err
	}
	if job.Attempt > w.config.MaxAttempts { // the others died with it, or took longer than their lease
		return true, w.fail(ctx, job, errNoResult)
	}
	start := time.Now()
	attempt, cancel := context.WithTimeoutCause(ctx, w.config.Lease-w.config.Lease/margin,
		fmt.Errorf("evidence timed out after %s", w.config.Lease-w.config.Lease/margin))
	files, err := w.gather(attempt, job)
	if err != nil && attempt.Err() != nil {
		err = context.Cause(attempt)
	}
	cancel()
	if ctx.Err() != nil {
		// The job goes back: this attempt was ours to break off.
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		return true, w.jobs.ReturnEvidence(back, job)
	}
	if err != nil {
		return true, w.fail(ctx, job, err)
	}
	stored, err := w.jobs.StoreEvidence(ctx, job, files)
	if err != nil {
		return true, err // the lease ends, and the job is done again
	}
	if stored {
		w.metrics.attempts.WithLabelValues("done").Inc()
		w.metrics.seconds.Observe(time.Since(start).Seconds())
		w.config.Log.Debug("evidence is stored", "review", job.ReviewID, "files", len(files), "took", time.Since(start))
	}
	return true, nil
}

// fail records a failed attempt: the last one, or one that no other try can better, is final.
func (w *Worker) fail(ctx context.Context, job postgres.EvidenceJob, cause error) error {
	final := job.Attempt >= w.config.MaxAttempts || permanent(cause)
	outcome := "retried"
	if final {
		outcome = "failed"
	}
	w.metrics.attempts.WithLabelValues(outcome).Inc()
	w.config.Log.Warn("evidence could not be made", "review", job.ReviewID, "attempt", job.Attempt, "final", final, "err",
		cause)
	wait := backoff.After(job.Attempt, w.config.RetryDelay, w.config.RetryDelay<<10)
	return w.jobs.FailEvidence(ctx, job, cause.Error(), wait, final)
}

var errNoResult = errors.New("its attempts ended without a result: the process died, or the lease ran out")

var errNoScore = errors.New("the score was dropped by retention")

// permanent reports whether retrying will not help.
func permanent(err error) bool {
	var broken *scoring.NonFiniteError
	var latent *schema.LatentError
	return errors.Is(err, errNoScore) || errors.As(err, &broken) || errors.As(err, &latent) ||
		errors.Is(err, scoring.ErrUnknownClass) ||
		errors.Is(err, scoring.ErrNoise) ||
		errors.Is(err, scoring.ErrSettings) || errors.Is(err, scoring.ErrTooLarge)
}

// gather makes the files of one job.
func (w *Worker) gather(ctx context.Context, job postgres.EvidenceJob) ([]postgres.EvidenceFile, error) {
	if job.Score == nil {
		return nil, errNoScore
	}
	engine := w.engines[job.Score.Receipt.EnsembleDigest]
	if engine == nil {
		return nil, fmt.Errorf("no ensemble %s is open here", job.Score.Receipt.EnsembleDigest)
	}
	request, err := replay.Prepare(ctx, w.config.Latents, job.Score)
	if err != nil {
		return nil, err
	}
	evidence, err := engine.Evidence(ctx, request)
	if err != nil {
		return nil, err
	}
	list, err := files(*job.Score, evidence, engine.Ensemble().Image, w.config.ImageSide)
	if err != nil {
		return nil, err
	}
	references, err := w.reference(ctx, engine, job.Score.ClassIndex)
	if err != nil && ctx.Err() == nil { // the evidence is worth having without them
		w.config.Log.Warn("reference images could not be made", "review", job.ReviewID, "err", err)
		return list, nil
	}
	return append(list, references...), err
}

// Names of the files of a review's evidence. The image of component i is "image-i".
const (
	fileMap      = "map"
	fileNumbers  = "numbers"
	fileProducer = "producer" // image of the table that stands for the production model
	// The images that the reference makes of the class are "reference-0", "reference-1", ...
	fileReference = "reference-"
)

// Numbers are the numbers of a review's evidence, its file "numbers".
type Numbers struct {
	Carrier  int     `json:"carrier"` // component whose path the score followed
	ClassGap float64 `json:"class_gap"`
	Risk     float64 `json:"request_risk"`
	Agrees   bool    `json:"agrees"` // every number is the stored one within the tolerance
	Width    int     `json:"width"`  // of the images as they were generated
	Height   int     `json:"height"` //
	// 1 minus the mean structural similarity of different components' images
	Diversity  float64         `json:"diversity"`
	Similarity [][]float64     `json:"similarity"`  // M x M
	Final      float64         `json:"final"`       // mean pairwise distance of the final latents
	MapMax     float64         `json:"map_max"`     // greatest value of the map, in nats
	MapMean    float64         `json:"map_mean"`    // in nats
	UpperBound float64         `json:"upper_bound"` // ln M, the end of the map's colors
	Trajectory []TrajectoryDot `json:"trajectory"`
}

// TrajectoryDot is the disagreement of the components if they leave the shared path at one step.
type TrajectoryDot struct {
	Step         int     `json:"step"`
	Value        float64 `json:"value"`         // PaiDE, in nats
	MeanDistance float64 `json:"mean_distance"` // cannot saturate
}

// files returns the files of evidence: an image for each component and for the producer, the map, the numbers.
func files(score schema.Score, e scoring.Evidence, shape ensemble.Image, side int) ([]postgres.EvidenceFile, error) {
	var list []postgres.EvidenceFile
	for i, pixels := range e.Images {
		body, err := encodeImage(pixels, shape, side)
		if err != nil {
			return nil, fmt.Errorf("image %d: %w", i, err)
		}
		list = append(list, postgres.EvidenceFile{Name: fmt.Sprintf("image-%d", i), ContentType: "image/png", Body: body})
	}
	bound := e.Result.ClassGap.UpperBound
	for _, m := range e.Trajectory {
		bound = max(bound, m.UpperBound)
	}
	heat, err := encodeMap(e.ImageMap, shape.Width, shape.Height, bound, side)
	if err != nil {
		return nil, fmt.Errorf("map: %w", err)
	}
	list = append(list, postgres.EvidenceFile{Name: fileMap, ContentType: "image/png", Body: heat})
	if e.Producer != nil {
		body, err := encodeImage(e.Producer.Image, shape, side)
		if err != nil {
			return nil, fmt.Errorf("image of the producer: %w", err)
		}
		list = append(list, postgres.EvidenceFile{Name: fileProducer, ContentType: "image/png", Body: body})
	}
	n := Numbers{
		Carrier: e.Result.Receipt.Carrier, ClassGap: e.Result.ClassGap.Value,
		Risk:   e.Result.RequestRisk.Value, // a rerun measures it always
		Agrees: replay.Compare(&score, e.Result).Agrees,
		Width:  shape.Width, Height: shape.Height, Diversity: e.Diversity, Similarity: e.Similarity, Final: e.Final.Value,
		UpperBound: bound,
	}
	for _, v := range e.ImageMap {
		n.MapMax = max(n.MapMax, v)
		n.MapMean += v / float64(len(e.ImageMap))
	}
	for _, m := range e.Trajectory {
		n.Trajectory = append(n.Trajectory, TrajectoryDot{m.BranchStep, m.Value, m.MeanDistance})
	}
	body, err := json.Marshal(n)
	if err != nil {
		return nil, fmt.Errorf("numbers: %w", err)
	}
	return append(list, postgres.EvidenceFile{Name: fileNumbers, ContentType: "application/json", Body: body}), nil
}

// measure keeps the metrics of what is owed.
func (w *Worker) measure(ctx context.Context) {
	s, err := w.jobs.EvidenceStats(ctx)
	if err != nil {
		return // the next turn says so
	}
	w.metrics.pending.Set(float64(s.Pending))
	w.metrics.failed.Set(float64(s.Failed))
	w.metrics.oldest.Set(s.Oldest.Seconds())
}
