package main

import (
	"cmp"
	"context"
	"log/slog"
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// samplerFlags describe how a producer ran a request.
type samplerFlags struct {
	Noise    string            `placeholder:"NAME" help:"torch-cpu, torch-cuda or decuwatch. Defaults to the ensemble's."`
	Sampler  string            `placeholder:"NAME" help:"Sampler of the producer. Defaults to ddim if needed."`
	Steps    *int              `placeholder:"N" help:"Steps of the producer. Defaults to 50 with a sampler."`
	Guidance *float64          `placeholder:"G" help:"Guidance scale of the producer. Defaults to 1 with a sampler."`
	Eta      *float64          `placeholder:"ETA" help:"Eta of the producer. Defaults to 0."`
	Label    map[string]string `placeholder:"KEY=VALUE" help:"Label of the event; may be repeated."`
}

// generation returns a request as an event's data.
func (f samplerFlags) generation(model string, c schema.Class, seed uint64) schema.Generation {
	g := schema.Generation{Model: model, Class: c, Seed: seed, Noise: f.Noise, Labels: f.Label}
	if f.Sampler != "" || f.Steps != nil || f.Guidance != nil || f.Eta != nil {
		g.Sampler = &schema.Sampler{Name: cmp.Or(f.Sampler, scoring.Diffusion{}.Sampler()), Steps: 50, GuidanceScale: 1}
		set(&g.Sampler.Steps, f.Steps)
		set(&g.Sampler.GuidanceScale, f.Guidance)
		set(&g.Sampler.Eta, f.Eta)
	}
	return g
}

// check refuses what JSON cannot carry.
func (f samplerFlags) check() error {
	for name, value := range map[string]*float64{"--guidance": f.Guidance, "--eta": f.Eta} {
		if value != nil && (math.IsNaN(*value) || math.IsInf(*value, 0)) {
			return usage("%s is %g, must be finite", name, *value)
		}
	}
	return nil
}

// set sets what a flag was given for.
func set[T any](field, flag *T) {
	if flag != nil {
		*field = *flag
	}
}

type scoreCmd struct {
	Class        string `required:"" placeholder:"CLASS" help:"Class: an index, or a label."`
	Seed         uint64 `required:"" placeholder:"N" help:"Seed of the first latent."`
	samplerFlags `embed:""`
	Source       string            `default:"/decuwatch/score" help:"Source of the event."`
	ID           string            `default:"offline" help:"Id of the event."`
	Scoring      app.ScoringConfig `embed:"" prefix:"scoring." group:"Scoring" hides:"background-share"`
}

func (scoreCmd) Help() string {
	return `Reruns one request and prints its score with the whole receipt as JSON. It needs neither NATS nor Postgres, ` +
		`and stores nothing. Source and id choose the component that carries the shared path.

Examples:

  decuwatch score -e ensembles/fashion-mnist --class 3 --seed 7
  decuwatch score -e ensembles/fashion-mnist --class "Ankle boot" --seed 7 | jq .class_gap.value
  decuwatch score -e ensembles/fashion-mnist --class Bag --seed 7 --scoring.profile as-requested \
      --steps 50 --guidance 2`
}

func (c *scoreCmd) Run(ctx context.Context, s *streams, log *slog.Logger) (err error) {
	if len(c.Scoring.Ensembles) != 1 {
		return usage("scoring.ensembles names %d ensembles, score needs exactly one", len(c.Scoring.Ensembles))
	}
	if err := c.check(); err != nil {
		return err
	}
	life, ctx := app.NewLifecycle(ctx, log)
	defer life.End(&err)
	engines, err := app.OpenEngines(c.Scoring, prometheus.NewRegistry(), slog.New(slog.DiscardHandler), life)
	if err != nil {
		return err
	}
	for name, engine := range engines {
		index, err := classIndex(engine.Ensemble(), c.Class)
		if err != nil {
			return err
		}
		class := schema.ParseClass(c.Class)
		if class.Label != "" {
			class.Label = engine.Ensemble().Classes[index].Label
		}
		ev := schema.Event{Source: c.Source, ID: c.ID, Time: time.Now().UTC().Truncate(time.Microsecond),
			Data: c.generation(name, class, c.Seed)}
		if _, _, err := schema.Encode(ev); err != nil { // the bounds of an event
			return usage("%w", err)
		}
		models, err := app.Models(engines, c.Scoring)
		if err != nil {
			return err
		}
		score, skip, err := monitor.ScoreOnce(ctx, models[name], ev)
		if err != nil {
			return err
		}
		if skip != nil {
			return writeIndented(s.out, map[string]any{"event": eventView(ev),
				"skip": map[string]string{"reason": string(skip.Reason), "detail": skip.Detail}})
		}
		return writeIndented(s.out, scoreView{eventView(ev), *score})
	}
	return nil
}

// event is how an event is printed.
type event struct {
	Source string            `json:"source"`
	ID     string            `json:"id"`
	Time   time.Time         `json:"time"`
	Data   schema.Generation `json:"data"`
}

func eventView(e schema.Event) event { return event{e.Source, e.ID, e.Time, e.Data} }

// scoreView is how a score is printed.
type scoreView struct {
	Event event `json:"event"`
	schema.Score
}
