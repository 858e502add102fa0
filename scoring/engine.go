// Package scoring reruns a generation request through a DECU ensemble and measures how far its components disagree.
// All requests in flight share the runs of the backbone.
package scoring

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/scoring/diffusion"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/ort"
)

// Options configure an [Engine]. Fields with a name are settings.
type Options struct {
	// ONNX Runtime's shared library. Defaults to ONNXRUNTIME_LIB, else .tools/onnxruntime-1.27.0/libonnxruntime.so.1 in
	// the working directory or above it, else beside the program, else the system's.
	Library string `name:"library" placeholder:"FILE"`
	// Device that runs the backbone: cpu, cuda:N or tensorrt:N.
	Device string `name:"device" default:"cpu"`
	// Threads of a session within an operator; 0 shares the CPUs among the sessions.
	Threads int `name:"threads" default:"0" min:"0" max:"1024"`
	// Sessions of the backbone that run side by side, each with its own rows.
	Sessions int `name:"sessions" default:"1" min:"1" max:"64"`
	// Maximum rows per backbone run, at least 2; 0 means 64 on CPU and 256 on a GPU.
	MaxBatchRows int `name:"max-batch-rows" default:"0" min:"0" max:"4096"`
	// Maximum rows of one request.
	MaxRequestRows int `name:"max-request-rows" default:"20000" min:"2" max:"1073741824"`
	// Least share of the rows that background work (evidence, re-scores) gets while events wait, so that reviews get
	// their evidence during a backlog. Shadow ensembles get this share of the time.
	BackgroundShare float64 `name:"background-share" default:"0.05" min:"0.01" max:"0.25"`
	// Maximum GPU memory of a session in bytes; 0 means no bound.
	MemoryLimit int64 `name:"memory-limit" default:"0" min:"0"`
	// Let the threads of a session spin between operators: faster if nothing else needs the CPUs.
	Spinning bool `name:"spinning"`

	// Buckets are the row counts to which runs are padded, warmed at start. Defaults to none on CPU, and on a GPU, where
	// every new shape costs a choice of algorithms, to powers of two and from 32 on to what lies halfway between them.
	Buckets    []int                 `kong:"-"`
	Profile    Profile               `kong:"-"` // the fixed profile. Defaults (zero value) to the manifest's
	Registerer prometheus.Registerer `kong:"-"` // of the sampler's metrics; nil registers nowhere
	Log        *slog.Logger          `kong:"-"` // Defaults to slog.Default
}

var devicePattern = regexp.MustCompile(`^(cpu|(cuda|tensorrt):[0-9]{1,4})$`)

// Check returns an error that names the settings out of their bounds.
func (o Options) Check() error {
	errs := []error{settings.Check("scoring", o)}
	if !devicePattern.MatchString(o.Device) {
		errs = append(errs, settings.Errorf("scoring.device is %q, must be cpu, cuda:N or tensorrt:N", o.Device))
	}
	if o.MaxBatchRows == 1 {
		errs = append(errs, settings.Errorf("scoring.max-batch-rows is 1, must be 0 or at least 2"))
	}
	return errors.Join(errs...)
}

// complete returns checked options with every default in place.
func (o Options) complete() (Options, error) {
	o = settings.WithDefaults(o)
	if err := o.Check(); err != nil {
		return o, err
	}
	o.Log = cmp.Or(o.Log, slog.Default())
	o.Threads = cmp.Or(o.Threads, max(1, runtime.GOMAXPROCS(0)/o.Sessions))
	if o.Device == "cpu" {
		o.MaxBatchRows = cmp.Or(o.MaxBatchRows, 64)
	}
	o.MaxBatchRows = cmp.Or(o.MaxBatchRows, 256)
	if o.Buckets == nil && o.Device != "cpu" {
		o.Buckets = defaultBuckets(o.MaxBatchRows)
	}
	if n := len(o.Buckets); n > 0 &&
		(!slices.IsSorted(o.Buckets) || o.Buckets[0] < 1 || o.Buckets[n-1] != o.MaxBatchRows) {
		return o, fmt.Errorf("option Buckets is %v, must ascend from 1 or more to MaxBatchRows %d", o.Buckets, o.MaxBatchRows)
	}
	return o, nil
}

// defaultBuckets returns the row counts of runs on a GPU.
func defaultBuckets(most int) (buckets []int) {
	for rows := 1; rows < most; rows *= 2 {
		buckets = append(buckets, rows)
		if between := rows + rows/2; rows >= 32 && between < most {
			buckets = append(buckets, between)
		}
	}
	return append(buckets, most)
}

// session returns the configuration of a session for runs of the given rows at most.
func (o Options) session(halfWeights bool, rows int) ort.Config {
	return ort.Config{
		Device: o.Device, Threads: o.Threads, MemoryLimit: o.MemoryLimit, Spinning: o.Spinning,
		HalfWeights: halfWeights, Rows: rows,
	}
}

// Engine scores requests. It is safe for concurrent use; Close releases it.
type Engine struct {
	options  Options
	ensemble *ensemble.Ensemble
	sampler  *sampler
	imager   *imager
	sessions []*ort.Session
	longest  time.Duration // run of a session at start-up
	fixed    Profile

	planning sync.Mutex
	plans    map[Profile]*plan
}

// maxPlans bounds the compiled plans that are kept; as-requested settings come from outside.
const maxPlans = 256

// imageRows is how many latents one run of the decoder takes, and images one run of the judge.
const imageRows = 8

// Open returns a [New] engine of the ensemble at path, a directory or a manifest.
func Open(path string, o Options) (*Engine, error) {
	verified, err := ensemble.Open(path)
	if err != nil {
		return nil, err
	}
	return New(verified, o)
}

// New loads the graphs of an ensemble, runs them once and starts the sampler. Close the engine after use.
//
//nolint:contextcheck // loading graphs cannot be cut short
func New(verified *ensemble.Ensemble, o Options) (_ *Engine, err error) {
	if o, err = o.complete(); err != nil {
		return nil, fmt.Errorf("open scoring engine: %w", err)
	}
	began := time.Now()
	e := &Engine{options: o, ensemble: verified, fixed: o.Profile, plans: map[Profile]*plan{}}
	if e.fixed == (Profile{}) {
		e.fixed = verified.Profile
	}
	e.fixed = e.fixed.Of(verified.Diffusion)
	if _, err := e.plan(e.fixed); err != nil {
		return nil, fmt.Errorf("fixed profile: %w", err)
	}
	library, err := ort.FindLibrary(o.Library)
	if err != nil {
		return nil, err
	}
	if err := ort.Load(library); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open scoring engine: %w", err), e.closeSessions())
		}
	}()
	if err := e.launch(); err != nil {
		return nil, err
	}
	if err := e.Check(context.Background(), 0); err != nil {
		return nil, errors.Join(err, e.sampler.close(), e.imager.close())
	}
	o.Log.Info("scoring engine is open", "ensemble", verified.Name, "digest", verified.Digest, "runtime", ort.Runtime(),
		"device", o.Device, "threads", o.Threads, "sessions", o.Sessions, "settings", e.fixed.Settings(),
		"took", time.Since(began))
	return e, nil
}

// launch loads the graphs, runs them and starts the goroutines that own them.
func (e *Engine) launch() error {
	workers, err := e.openBackbone()
	if err != nil {
		return err
	}
	decoder, judge, err := e.openStages()
	if err != nil {
		return err
	}
	o := e.options
	e.imager = newImager(e.ensemble, decoder, judge, imageRows, len(o.Buckets) > 0)
	e.sampler = newSampler(e.ensemble, workers, e.imager, o)
	hang := max(hangLeast, hangFactor*e.longest)
	for _, w := range workers {
		w.setHang(hang)
	}
	e.imager.setHang(hang)
	return nil
}

// openBackbone loads the backbone once a session and warms it: every bucket, or the smallest and the largest run.
func (e *Engine) openBackbone() ([]*worker, error) {
	m, o := &e.ensemble.Manifest, e.options
	latent := []int64{int64(m.Latent.Channels), int64(m.Latent.Height), int64(m.Latent.Width)}
	ports := m.Graph.UNet
	unet := ort.Graph{
		Inputs: []ort.Port{
			{Name: ports.Latent, Shape: latent},
			{Name: ports.Timestep},
			{Name: ports.Context, Shape: []int64{int64(m.Context.Tokens), int64(m.Context.Dim)}},
		},
		Output: ort.Port{Name: ports.Output, Shape: latent},
	}
	if m.Diffusion.Kind != diffusion.KindFlowMatch {
		unet.Timestep = ports.Timestep // whole numbers
	}
	for _, c := range m.Conditioning {
		port := ort.Port{Name: c.Input}
		for _, side := range c.Shape {
			port.Shape = append(port.Shape, int64(side))
		}
		unet.Inputs = append(unet.Inputs, port)
	}
	warm := o.Buckets
	if len(warm) == 0 {
		warm = []int{1, o.MaxBatchRows}
	}
	var workers []*worker
	for range o.Sessions {
		session, err := e.openSession(m.Files.UNet, unet, o.MaxBatchRows, warm...)
		if err != nil {
			return nil, err
		}
		w := &worker{
			runner: session, latent: session.Input(0), timestep: timesteps{session.Timesteps(), session.Input(1)},
			context: session.Input(2), output: session.Output(),
		}
		for i := range m.Conditioning {
			w.more = append(w.more, session.Input(3+i))
		}
		workers = append(workers, w)
	}
	return workers, nil
}

// openStages loads the decoder, and the judge if there is one.
func (e *Engine) openStages() (decoder stage, _ *judge, err error) {
	m := &e.ensemble.Manifest
	latent := []int64{int64(m.Latent.Channels), int64(m.Latent.Height), int64(m.Latent.Width)}
	image := []int64{int64(m.Image.Channels), int64(m.Image.Height), int64(m.Image.Width)}
	ports := m.Graph.Decoder
	decoder, err = e.openStage(m.Files.Decoder, ort.Port{Name: ports.Latent, Shape: latent},
		ort.Port{Name: ports.Output, Shape: image})
	if err != nil || m.Judge == nil {
		return decoder, nil, err
	}
	input, output := judgePorts(m.Judge)
	opened, err := e.openStage(*m.Files.Judge, input, output)
	return decoder, newJudge(opened, m.Judge, m.Image, len(m.Classes)), err
}

func (e *Engine) openStage(file ensemble.File, input, output ort.Port) (stage, error) {
	g := ort.Graph{Inputs: []ort.Port{input}, Output: output}
	session, err := e.openSession(file, g, imageRows, 1, imageRows)
	if err != nil {
		return stage{}, err
	}
	return stage{runner: session, input: session.Input(0), output: session.Output()}, nil
}

// openSession loads a graph of the ensemble and runs it with the given numbers of rows.
func (e *Engine) openSession(file ensemble.File, g ort.Graph, most int, warm ...int) (*ort.Session, error) {
	var err error
	if g.Content, err = e.ensemble.ReadFile(file); err != nil {
		return nil, err
	}
	if len(file.External) > 0 {
		g.Dir = e.ensemble.Dir
	}
	session, err := ort.NewSession(e.options.session(e.ensemble.Precision == "fp16", most), g)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file.Path, err)
	}
	e.sessions = append(e.sessions, session)
	for _, rows := range warm {
		began := time.Now()
		if err := session.Run(rows); err != nil {
			return nil, fmt.Errorf("%s: %w", file.Path, err)
		}
		e.longest = max(e.longest, time.Since(began))
	}
	return session, nil
}

func (e *Engine) closeSessions() error {
	var errs []error
	for _, session := range e.sessions {
		errs = append(errs, session.Close())
	}
	e.sessions = nil
	return errors.Join(errs...)
}

// Ensemble returns the verified ensemble.
func (e *Engine) Ensemble() *ensemble.Ensemble { return e.ensemble }

// Profile returns the fixed profile.
func (e *Engine) Profile() Profile { return e.fixed }

// Validate returns the error with which Score refuses a request before it does any work, or nil.
func (e *Engine) Validate(r Request) error {
	if _, err := e.plan(e.profile(r)); err != nil {
		return err
	}
	_, err := e.noise(r)
	return err
}

// Rows returns the rows of U-Net work that a request costs. It is 0 if Score would refuse its settings.
func (e *Engine) Rows(r Request) int {
	p, _, err := e.work(r)
	if err != nil {
		return 0
	}
	return p.rows
}

// work returns the plan of a request. If that measures no image risk, the reason says why.
func (e *Engine) work(r Request) (p *plan, reason string, err error) {
	profile := e.profile(r)
	p, err = e.plan(profile)
	switch {
	case err != nil:
		return nil, "", err
	case profile.ImageRisk == (Measure{}):
		return p, ReasonNoJudge, nil
	case r.Class < 0 || r.Class >= len(e.ensemble.Classes): // refused later
		return p, "", nil
	case !e.ensemble.Judge.CanTell(r.Class):
		profile.ImageRisk = Measure{}
		p, err = e.plan(profile)
		return p, ReasonJudgeCannotTell, err
	}
	return p, "", nil
}

func (e *Engine) profile(r Request) Profile {
	if r.Profile == (Profile{}) {
		return e.fixed
	}
	return r.Profile.Of(e.ensemble.Diffusion)
}

// plan returns the compiled work of a profile.
func (e *Engine) plan(profile Profile) (*plan, error) {
	profile = profile.Bare()
	e.planning.Lock()
	defer e.planning.Unlock()
	if p := e.plans[profile]; p != nil {
		return p, nil
	}
	measures := []Measure{profile.ClassGap, profile.RequestRisk}
	if profile.ImageRisk != (Measure{}) {
		measures = append(measures, profile.ImageRisk)
	}
	p, err := e.compile(profile, measures)
	if err != nil {
		return nil, err
	}
	stopped, err := newPlan(e.ensemble, profile, slices.Delete(slices.Clone(measures), requestRisk, requestRisk+1))
	if err != nil {
		return nil, err
	}
	p.rowsStopped = stopped.rows
	if len(e.plans) >= maxPlans {
		clear(e.plans)
	}
	e.plans[profile] = p
	return p, nil
}

// compile returns the plan of measurements by a profile's sampler.
func (e *Engine) compile(profile Profile, measures []Measure) (*plan, error) {
	if err := profile.Validate(&e.ensemble.Manifest); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSettings, err)
	}
	p, err := newPlan(e.ensemble, profile, measures)
	if err != nil {
		return nil, err
	}
	if p.rows > e.options.MaxRequestRows {
		return nil, fmt.Errorf("%w: %d rows, at most %d", ErrTooLarge, p.rows, e.options.MaxRequestRows)
	}
	if p.widest > e.options.MaxBatchRows {
		return nil, fmt.Errorf("%w: shared guidance needs runs of %d rows, scoring.max-batch-rows is %d", ErrTooLarge,
			p.widest, e.options.MaxBatchRows)
	}
	return p, nil
}

// Score reruns the request and measures it. It returns at once if the context ends, or with ErrClosed if the engine is
// closed. Retrying will not help after ErrUnknownClass, ErrNoise, ErrSettings, ErrTooLarge and *NonFiniteError. A
// *DeviceError says nothing about the request.
func (e *Engine) Score(ctx context.Context, r Request) (Result, error) {
	p, reason, err := e.work(r)
	if err != nil {
		return Result{}, err
	}
	t, receipt, err := e.run(ctx, r, p)
	if err != nil {
		return Result{}, err
	}
	defer e.sampler.release(t)
	if t.stopped {
		receipt.Rows = p.rowsStopped
	}
	result, err := e.result(ctx, r, t, reason)
	result.Receipt = receipt
	return result, err
}

// result reads the measurements of a task that ran. If reason is not "", it says why there is no image risk.
func (e *Engine) result(ctx context.Context, r Request, t *task, reason string) (result Result, err error) {
	measure := func(k int) Measurement { return t.plan.measure(t.plan.measures[k], t.means[k], e.ensemble.Latent) }
	result.ImageRiskReason = reason
	if t.gap != nil {
		result.ClassGap = *t.gap
	} else {
		result.ClassGap = measure(classGap)
	}
	if t.stopped {
		result.RequestRiskReason = ReasonBelowCut
	} else {
		risk := measure(requestRisk)
		result.RequestRisk = &risk
	}
	if reason == "" {
		result.ImageRisk, err = e.imageRisk(ctx, r, t.plan.measures[imageRisk], t.means[imageRisk])
	}
	var nonFinite *NonFiniteError
	if errors.As(err, &nonFinite) { // the sessions work, so the other measurements stand
		result.ImageRiskReason, err = ReasonNotFinite, nil
	}
	return result, err
}

// imageRisk lets the judge look at the producer's predicted image.
func (e *Engine) imageRisk(ctx context.Context, r Request, m Measure, predicted [][]float32) (*Measurement, error) {
	pictures, err := e.imager.run(ctx, predicted, true, r.Priority)
	if err != nil {
		return nil, err
	}
	p, risk := pictures[0].Probabilities, newMeasurement(m)
	risk.Value, risk.UpperBound, risk.Top = 1-p[r.Class], 1, top(p, e.ensemble.Judge.Outputs)
	risk.Distances, risk.Shares = [][]float64{}, []float64{}
	return &risk, nil
}

// run takes a request through the sampler. If there is no error, the caller must release the task.
func (e *Engine) run(ctx context.Context, r Request, p *plan) (*task, Receipt, error) {
	noise, err := e.noise(r)
	if err != nil {
		return nil, Receipt{}, err
	}
	if err := ctx.Err(); err != nil {
		return nil, Receipt{}, err
	}
	if own := r.Latent; own != nil && len(own.Values) != e.ensemble.Latent.Size() {
		return nil, Receipt{}, fmt.Errorf("%w: the event's own latent %s is not at hand", ErrNoise, own.SHA256)
	}
	t := e.sampler.newTask(p, r)
	t.draw(noise, r.Latent)
	if err := e.sampler.run(ctx, t); err != nil {
		return nil, Receipt{}, err
	}
	return t, e.receipt(r, p), nil
}

// receipt returns the receipt of a request that ran.
func (e *Engine) receipt(r Request, p *plan) Receipt {
	profile, class := e.profile(r), e.ensemble.Classes[r.Class]
	receipt := Receipt{
		EnsembleDigest: e.ensemble.Digest, Profile: ProfileAsRequested, Settings: profile.Settings(),
		Steps: profile.RequestRisk.Steps, GuidanceScale: profile.GuidanceScale, Eta: profile.Eta,
		Seed: r.Seed, Noise: e.generator(r), Carrier: Carrier(r.Key, e.ensemble.Components), Rows: p.rows,
		Runtime: ort.Runtime(), Device: e.options.Device, ClassDraws: class.Draws,
		NoiseDtype: r.Draw.Dtype, NoiseOffset: r.Draw.Offset, SMs: r.Draw.GPU.SMs, ThreadsPerSM: r.Draw.GPU.ThreadsPerSM,
		BatchIndex: r.Draw.Batch.Index, BatchSize: r.Draw.Batch.Size,
	}
	if r.Latent != nil {
		receipt.LatentSHA256, receipt.LatentStep = r.Latent.SHA256, r.Latent.Step
	}
	if class.Data != nil {
		receipt.ClassImages, receipt.ClassNEff = class.Data.Images, class.Data.NEff
	}
	if profile.Bare() == e.fixed.Bare() {
		receipt.Profile = ProfileFixed
	}
	return receipt
}

// generator returns the name of the generator that draws a request's first latent.
func (e *Engine) generator(r Request) string {
	if r.Noise == "" {
		return e.ensemble.Noise
	}
	return r.Noise
}

// noise returns the generator of a request's noise. It refuses what else of the request is out of bounds.
func (e *Engine) noise(r Request) (diffusion.Noise, error) {
	if r.Class < 0 || r.Class >= len(e.ensemble.Classes) {
		return nil, fmt.Errorf("%w: %d, the ensemble has 0 to %d", ErrUnknownClass, r.Class, len(e.ensemble.Classes)-1)
	}
	if r.Priority != Live && r.Priority != Background {
		return nil, fmt.Errorf("%w: priority is %d", ErrSettings, r.Priority)
	}
	if !(r.Cut >= 0) {
		return nil, fmt.Errorf("%w: cut is %g, must be at least 0", ErrSettings, r.Cut)
	}
	profile := e.profile(r)
	if step := latentStep(r); profile.Start != step {
		return nil, fmt.Errorf("%w: the profile starts at step %d, the latent stands at %d", ErrSettings, profile.Start, step)
	}
	if r.Latent != nil && profile.Eta == 0 {
		return nil, nil // nothing is drawn
	}
	noise, err := diffusion.NewNoise(e.generator(r), r.Seed, e.ensemble.Latent.Size(), r.Draw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoise, err)
	}
	if n := e.drawn(profile, r.Draw); n > maxDrawn {
		return nil, fmt.Errorf("%w: with eta %g, %d numbers are drawn for all steps and images together, at most %d",
			ErrNoise, profile.Eta, n, maxDrawn)
	}
	return noise, nil
}

// maxDrawn bounds the numbers that one request draws, which takes seconds and cannot be cut short.
const maxDrawn = 4 * diffusion.MaxDraw

// drawn returns how many numbers a request draws: the first latents of all images drawn together and, if eta is not 0,
// as many for each step.
func (e *Engine) drawn(p Profile, d Draw) int {
	n := e.ensemble.Latent.Size() * max(1, d.Batch.Size)
	if p.Eta == 0 {
		return n
	}
	return n * (1 + p.Start + max(p.ClassGap.Steps, p.RequestRisk.Steps, p.ImageRisk.Steps))
}

// latentStep returns the step at which the request's latent stands.
func latentStep(r Request) int {
	if r.Latent == nil {
		return 0
	}
	return r.Latent.Step
}

// Busy reports whether live requests wait or run, so that work on another engine of the same device can stand back.
func (e *Engine) Busy() bool { return e.sampler.busy() }

// Close refuses new requests, ends the requests in flight with ErrClosed, waits for running C calls and releases the
// sessions. If a C call does not return, the error is ErrHung and the sessions stay, because the call still uses them.
func (e *Engine) Close() error {
	if err := errors.Join(e.sampler.close(), e.imager.close()); err != nil {
		return err
	}
	return e.closeSessions()
}
