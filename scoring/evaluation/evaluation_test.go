package evaluation

import (
	"math"
	"slices"
	"testing"
)

var (
	positive = []float64{0.9, 0.8, 0.7, 0.55, 0.4, 0.8, 0.35}
	negative = []float64{0.6, 0.5, 0.4, 0.4, 0.2, 0.1, 0.8, 0.3, 0.05}
)

func closeTo(t *testing.T, what string, got, want float64) {
	t.Helper()
	if !(math.Abs(got-want) <= 1e-12) {
		t.Errorf("%s is %v, want %v", what, got, want)
	}
}

// The wanted values are those of scikit-learn's roc_auc_score, average_precision_score and roc_curve
// (drop_intermediate=False), and of scipy 1.17.1's rankdata and spearmanr.
func TestAgainstScipy(t *testing.T) {
	closeTo(t, "AUROC", AUROC(positive, negative), 0.7936507936507936)
	closeTo(t, "AUPRC", AUPRC(positive, negative), 0.7347247990105132)
	for at, want := range map[float64]float64{0.01: 0.14285714285714285, 0.12: 0.5714285714285714,
		0.3: 0.7142857142857143} {
		closeTo(t, "TPR", TPR(positive, negative, at), want)
	}
	a, b := []float64{3, 1, 4, 1, 5, 9, 2, 6}, []float64{2, 7, 1, 8, 2, 8, 1, 8}
	if got, want := Ranks(a), []float64{4, 1.5, 5, 1.5, 6, 8, 3, 7}; !slices.Equal(got, want) {
		t.Errorf("ranks are %v, want %v", got, want)
	}
	closeTo(t, "Spearman", Spearman(a, b), 0.19885368120992467)
}

func TestExtremes(t *testing.T) {
	low, high, alike := []float64{1, 2, 3}, []float64{4, 5, 6, 7}, []float64{1, 1, 1}
	for _, c := range []struct {
		what               string
		positive, negative []float64
		auroc, auprc, tpr  float64
	}{
		{"separated", high, low, 1, 1, 1},
		{"all alike", alike, alike, 0.5, 0.5, 0},
		// Precision if the three positives come last: 1/5, 2/6, 3/7 at a third of the recall each.
		{"the wrong way round", low, high, 0, (1./5 + 2./6 + 3./7) / 3, 0},
	} {
		closeTo(t, c.what+": AUROC", AUROC(c.positive, c.negative), c.auroc)
		closeTo(t, c.what+": AUPRC", AUPRC(c.positive, c.negative), c.auprc)
		closeTo(t, c.what+": TPR", TPR(c.positive, c.negative, 0.01), c.tpr)
	}
	for what, v := range map[string]float64{"AUROC": AUROC(nil, low), "AUPRC": AUPRC(low, nil),
		"TPR": TPR(nil, nil, 0.01), "Spearman": Spearman(alike, low)} {
		if !math.IsNaN(v) {
			t.Errorf("%s of nothing is %v, want NaN", what, v)
		}
	}
}

// Two classes, each with 1 image in one rotation and 100 in the other.
var cells = []Cell{{0, 0, 1}, {0, 1, 100}, {1, 0, 100}, {1, 1, 1}}

func TestJudgeClasses(t *testing.T) {
	// Class 1 scores higher than class 0 whatever its images: it is told apart within each class, not across them.
	scores := [][]float64{{2, 3}, {12, 13}, {0, 1}, {14, 15}}
	level := JudgeClasses(cells, scores)
	if len(level.Against) != 1 || len(level.Means) != 2 {
		t.Fatalf("level is %+v", level)
	}
	a := level.Against[0]
	closeTo(t, "AUROC", a.AUROC.Value, 0.75)
	closeTo(t, "same-class AUROC", *a.SameClass, 1)
	if a.Bin != 1 || a.ClassesAt != 2 || a.Classes != 2 {
		t.Errorf("bin %v has %d of %d classes", a.Bin, a.ClassesAt, a.Classes)
	}
	// Cells drawn twice: 2 or 14 against 0 or 12, so AUROC lies in [0, 1], and the interval holds the value.
	if !(a.AUROC.Low < 0.75 && a.AUROC.High > 0.75 && a.AUROC.Low >= 0 && a.AUROC.High <= 1) {
		t.Errorf("interval is %+v", a.AUROC)
	}
	closeTo(t, "mean of 1 image", level.Means[0].Mean.Value, 8.5)
	closeTo(t, "mean of 100 images", level.Means[1].Mean.Value, 6.5)
	// Ranks of the scores 3 4 5 6 1 2 7 8 by cell, of the bins 2.5 and 6.5: covariance over variances.
	closeTo(t, "rho", *level.Rho, Spearman([]float64{3, 4, 5, 6, 1, 2, 7, 8}, []float64{1, 1, 2, 2, 2, 2, 1, 1}))
	if again := JudgeClasses(cells, scores); again.Against[0].AUROC != a.AUROC {
		t.Errorf("equal scores give the intervals %+v and %+v", a.AUROC, again.Against[0].AUROC)
	}
	// One bin leaves nothing to tell apart.
	if one := JudgeClasses([]Cell{{0, 0, 5}, {0, 1, 5}}, [][]float64{{1, 2}, {3, 4}}); len(one.Against) != 0 ||
		one.Rho != nil {
		t.Errorf("one bin gives %+v", one)
	}
}

func TestJudgeRequests(t *testing.T) {
	scores := [][]float64{{1, 2, 3}, {1, 2, 3}, {3, 2, 1}, {1, 1, 1}}
	errors := [][]float64{{10, 20, 30}, {5, 6, 7}, {1, 2, 3}, {1, 2, 3}}
	level := JudgeRequests(cells, scores, errors)
	closeTo(t, "within", level.Within.Value, 1./3) // 1, 1 and -1; the cell that is all alike is left out
	closeTo(t, "bin of 1 image", *level.ByBin[0].Within, 1)
	closeTo(t, "bin of 100 images", *level.ByBin[1].Within, 0)
	if !(level.Within.Low < 1./3 && level.Within.High > 1./3 && level.Within.Low >= -1 && level.Within.High <= 1) {
		t.Errorf("interval is %+v", *level.Within)
	}
	if none := JudgeRequests(cells[:1], scores[3:], errors[3:]); none.Within != nil || none.Overall != nil ||
		none.ByBin[0].Within != nil {
		t.Errorf("scores that are all alike give %+v", none)
	}
}

func TestSquaredDistance(t *testing.T) {
	closeTo(t, "distance", squaredDistance([]float32{1, 2, 3}, []float32{1, 4, 0}), 13)
}
