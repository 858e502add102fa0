package evaluation

import (
	"testing"

	"github.com/decuwatch/decuwatch/scoring"
)

func TestParseProfile(t *testing.T) {
	base := scoring.Profile{
		Steps: 10, GuidanceScale: 2, ClassGap: scoring.Measure{BranchStep: 0, RolloutSteps: 1, Estimator: "paide-w2"},
		RequestRisk: scoring.Measure{BranchStep: 0, RolloutSteps: 8, Estimator: "mean-w2"}, Reason: "measured",
	}
	d := scoring.Diffusion{
		TrainTimesteps: 1000, BetaSchedule: "linear", BetaStart: 0.0001, BetaEnd: 0.02, Prediction: "epsilon",
		TimestepSpacing: "leading",
	}
	for text, want := range map[string]string{
		"steps=10,guidance=2": "ddim s=10 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@0+8",
		"steps=20":            "ddim s=20 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@0+16",
		"guidance=1,eta=0.5,class_gap=9+1:paide-kl,request_risk=5+2:pixel-paide-w2": "ddim s=10 g=1 eta=0.5 " +
			"class_gap=paide-kl@9+1 request_risk=pixel-paide-w2@5+2",
	} {
		p, err := ParseProfile(text, base, d)
		if err != nil || p.Settings() != want || p.Reason != "" {
			t.Errorf("%q is %s (reason %q), %v; want %s", text, p.Settings(), p.Reason, err, want)
		}
	}
	for _, text := range []string{"", "steps", "step=10", "steps=ten", "steps=0", "guidance=x", "guidance=31",
		"steps=10,steps=20", "class_gap=1", "class_gap=0+1", "class_gap=0+1:w2", "request_risk=9+2:mean-w2"} {
		if p, err := ParseProfile(text, base, d); err == nil {
			t.Errorf("%q is taken as %s", text, p.Settings())
		}
	}
}
