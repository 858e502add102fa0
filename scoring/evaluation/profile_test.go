package evaluation

import (
	"testing"

	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

func TestParseProfile(t *testing.T) {
	measure := func(rollout int, estimator string) scoring.Measure {
		return scoring.Measure{
			Tables: "members", Steps: 10, Guidance: "own", RolloutSteps: rollout, Estimator: estimator,
		}
	}
	e := &ensemble.Manifest{
		Posterior: 3, Judge: &ensemble.Judge{},
		Profile: scoring.Profile{
			GuidanceScale: 2, ClassGap: measure(1, "paide-w2"), RequestRisk: measure(8, "mean-w2"), Reason: "measured",
		},
		Diffusion: scoring.Diffusion{
			TrainTimesteps: 1000, BetaSchedule: "linear", BetaStart: 0.0001, BetaEnd: 0.02, Prediction: "epsilon",
			TimestepSpacing: "leading",
		},
	}
	for text, want := range map[string]string{
		"steps=10,guidance=2": "ddim s=10 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@0+8",
		"steps=20":            "ddim s=20 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@0+16",
		"guidance=1,eta=0.5,class_gap=9+1:paide-kl,request_risk=5+2:pixel-paide-w2": "ddim s=10 g=1 eta=0.5 " +
			"class_gap=paide-kl@9+1 request_risk=pixel-paide-w2@5+2",
		"request_risk=0+2/3:mean-w2:members:shared,class_gap=0+1:paide-w2:posterior:shared": "ddim g=2 eta=0 " +
			"class_gap=paide-w2@0+1/10:posterior:shared request_risk=mean-w2@0+2/3:members:shared",
		"image_risk=0+3/4:judge,steps=20,class_gap=0+1/3:paide-w2": "ddim g=2 eta=0 class_gap=paide-w2@0+1/3:members:own " +
			"request_risk=mean-w2@0+16/20:members:own image_risk=judge@0+3/4:producer:own",
		"image_risk=none": "ddim s=10 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@0+8",
	} {
		p, err := ParseProfile(text, e)
		if err != nil || p.Settings() != want || p.Reason != "" {
			t.Errorf("%q is %s (reason %q), %v; want %s", text, p.Settings(), p.Reason, err, want)
		}
	}
	for _, text := range []string{"", "steps", "step=10", "steps=ten", "steps=0", "guidance=x", "guidance=31",
		"steps=10,steps=20", "class_gap=1", "class_gap=0+1", "class_gap=0+1:w2", "request_risk=9+2:mean-w2",
		"class_gap=0+1/x:paide-w2", "class_gap=0+1/1001:paide-w2", "class_gap=0+1:paide-w2:producer",
		"class_gap=0+1:paide-w2:members:none", "request_risk=5+1:mean-w2:members:shared",
		"request_risk=0+1:mean-w2:members:own:own", "image_risk=0+3:mean-w2", "image_risk=0+3:judge:members",
		"image_risk=1+3:judge", "request_risk=none"} {
		if p, err := ParseProfile(text, e); err == nil {
			t.Errorf("%q is taken as %s", text, p.Settings())
		}
	}
}
