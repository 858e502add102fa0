package evaluation

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// ParseProfile reads a profile such as "steps=10,guidance=2,class_gap=0+1:paide-w2". What the text does not name is
// taken from the manifest's profile; if steps is named, every measurement gets them and keeps its relative place. The
// error names the key.
func ParseProfile(text string, e *ensemble.Manifest) (scoring.Profile, error) {
	p := e.Profile
	steps := 0
	measures, seen := map[schema.MeasurementName]scoring.Measure{}, map[string]bool{}
	for field := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(field, "=")
		if seen[key] {
			return scoring.Profile{}, fmt.Errorf("%s is given twice", key)
		}
		seen[key] = true
		var err error
		switch name := schema.MeasurementName(key); {
		case ok && key == "steps":
			steps, err = strconv.Atoi(value)
		case ok && key == "guidance":
			p.GuidanceScale, err = strconv.ParseFloat(value, 64)
		case ok && key == "eta":
			p.Eta, err = strconv.ParseFloat(value, 64)
		case ok && (name == schema.ClassGap || name == schema.RequestRisk):
			measures[name], err = parseMeasure(value)
		default:
			return scoring.Profile{}, fmt.Errorf("%q is not one of steps=, guidance=, eta=, class_gap=, request_risk=", field)
		}
		if err != nil {
			return scoring.Profile{}, fmt.Errorf("%s: %w", key, err)
		}
	}
	if seen["steps"] {
		p = p.WithSampler(e.Diffusion, steps, p.GuidanceScale, p.Eta)
	}
	p.Reason = ""
	for name, given := range measures {
		m := &p.ClassGap
		if name == schema.RequestRisk {
			m = &p.RequestRisk
		}
		m.BranchStep, m.RolloutSteps, m.Estimator = given.BranchStep, given.RolloutSteps, given.Estimator
	}
	return p, p.Validate(e)
}

func parseMeasure(text string) (scoring.Measure, error) {
	place, estimator, _ := strings.Cut(text, ":")
	branch, rollout, _ := strings.Cut(place, "+")
	m := scoring.Measure{Estimator: estimator}
	var err error
	if m.BranchStep, err = strconv.Atoi(branch); err == nil {
		m.RolloutSteps, err = strconv.Atoi(rollout)
	}
	if err != nil {
		return m, fmt.Errorf("is %q, must be BRANCH_STEP+ROLLOUT_STEPS:ESTIMATOR", text)
	}
	return m, nil
}
