package evaluation

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// ParseProfile reads a profile such as "guidance=2,request_risk=0+2/3:mean-w2:members:shared,image_risk=none". What
// the text does not name is taken from the manifest's profile. If it names steps, every measurement takes them and
// keeps its relative place, unless the text places it, too. The error names the key.
func ParseProfile(text string, m *ensemble.Manifest) (scoring.Profile, error) {
	p := m.Profile
	p.Reason = ""
	values := map[string]string{}
	for field := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(field, "=")
		if _, seen := values[key]; seen {
			return scoring.Profile{}, fmt.Errorf("%s is given twice", key)
		}
		values[key] = value
	}
	if value, ok := values["steps"]; ok { // before the measurements, which may say otherwise
		steps, err := strconv.Atoi(value)
		if err != nil {
			return scoring.Profile{}, fmt.Errorf("steps: %w", err)
		}
		p = p.WithSampler(m.Diffusion, steps, p.GuidanceScale, p.Eta)
	}
	for field := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(field, "=")
		var err error
		switch key {
		case "steps":
		case "guidance":
			p.GuidanceScale, err = strconv.ParseFloat(value, 64)
		case "eta":
			p.Eta, err = strconv.ParseFloat(value, 64)
		case string(schema.ClassGap):
			p.ClassGap, err = parseMeasure(value, p.ClassGap)
		case string(schema.RequestRisk):
			p.RequestRisk, err = parseMeasure(value, p.RequestRisk)
		case string(schema.ImageRisk):
			p.ImageRisk, err = parseImageRisk(value, p)
		default:
			err = errors.New("is not one of steps, guidance, eta, class_gap, request_risk, image_risk")
		}
		if err != nil {
			return scoring.Profile{}, fmt.Errorf("%s: %w", key, err)
		}
	}
	return p, p.Validate(m)
}

func parseImageRisk(text string, p scoring.Profile) (scoring.Measure, error) {
	if text == "none" {
		return scoring.Measure{}, nil
	}
	base := p.ImageRisk
	if base == (scoring.Measure{}) {
		base = scoring.Measure{
			Tables: ensemble.TablesProducer, Steps: p.RequestRisk.Steps, Guidance: ensemble.GuidanceOwn,
		}
	}
	return parseMeasure(text, base)
}

// parseMeasure reads BRANCH_STEP+ROLLOUT_STEPS[/STEPS]:ESTIMATOR[:TABLES[:GUIDANCE]]. What is left out is taken from
// base.
func parseMeasure(text string, base scoring.Measure) (scoring.Measure, error) {
	m := base
	fields := strings.Split(text, ":")
	place, steps, withSteps := strings.Cut(fields[0], "/")
	branch, rollout, _ := strings.Cut(place, "+")
	var err error
	if m.BranchStep, err = strconv.Atoi(branch); err == nil {
		m.RolloutSteps, err = strconv.Atoi(rollout)
	}
	if err == nil && withSteps {
		m.Steps, err = strconv.Atoi(steps)
	}
	if err != nil || len(fields) < 2 || len(fields) > 4 {
		return m, fmt.Errorf("is %q, must be BRANCH_STEP+ROLLOUT_STEPS[/STEPS]:ESTIMATOR[:TABLES[:GUIDANCE]]", text)
	}
	for i, field := range []*string{&m.Estimator, &m.Tables, &m.Guidance} {
		if i+1 < len(fields) {
			*field = fields[i+1]
		}
	}
	return m, nil
}
