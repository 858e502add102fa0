package monitor

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/decuwatch/decuwatch/monitor/sampling"
	"github.com/decuwatch/decuwatch/schema"
)

// newSamplers returns the sampler of each model.
func newSamplers(models map[string]Model, c Config) (map[string]sampling.Sampler, error) {
	samplers := map[string]sampling.Sampler{}
	for _, name := range slices.Sorted(maps.Keys(models)) {
		sampler, unknown, err := c.Sampling.For(name, models[name].Classes, models[name].Images)
		if err != nil {
			return nil, fmt.Errorf("model %s: %w", name, err)
		}
		if len(unknown) > 0 && c.Log != nil {
			c.Log.Warn("sampling rules name classes that the ensemble does not have: they apply to events of unknown classes",
				"model", name, "classes", unknown)
		}
		samplers[name] = sampler
	}
	return samplers, nil
}

// unbounded is the budget of a monitor without one.
type unbounded struct{}

func (unbounded) Share(context.Context, string, schema.Delivery) (float64, error) { return 1, nil }
func (unbounded) Take(context.Context, string, int, schema.Delivery) (bool, error) {
	return true, nil
}
func (unbounded) Give(string, int) {}

// giveBack gives back to the budget what was taken for an event and not used, once.
func (m *Monitor) giveBack(p *plan) {
	m.budget.Give(p.event.Data.Model, max(0, p.paid))
	p.paid = 0
}

// spend decides by lot whether an event is scored, and takes its rows from the budget. What is not scored becomes a
// skip.
func (m *Monitor) spend(ctx context.Context, p *plan, d schema.Delivery) error {
	if p.skip != nil {
		return nil
	}
	model := p.event.Data.Model
	sampler := m.samplers[model]
	probability, free := sampler.Share(p.event, p.class)
	if !free {
		share, err := m.budget.Share(ctx, model, d)
		if err != nil {
			return fmt.Errorf("read the share in force: %w", err)
		}
		probability *= share
	}
	if !sampler.Selects(p.event, probability) {
		p.err, p.skip = nil, &schema.Skip{
			Event: p.event, Reason: schema.SkipSampledOut, Detail: fmt.Sprintf("a share of %.4g is scored", probability),
			InclusionProbability: &probability,
		}
		return nil
	}
	if p.err != nil {
		return nil //nolint:nilerr // what cannot be scored costs nothing; handling it reports why
	}
	if probability < 1 {
		p.probability = probability
	}
	rows := p.rows()
	taken, err := m.budget.Take(ctx, model, rows, d)
	if err != nil {
		return fmt.Errorf("take %d rows from the budget: %w", rows, err)
	}
	if !taken {
		p.skip = &schema.Skip{
			Event: p.event, Reason: schema.SkipBudget,
			Detail: fmt.Sprintf("the model's budget had no room for %d rows", rows),
		}
		return nil
	}
	p.paid = rows
	return nil
}
