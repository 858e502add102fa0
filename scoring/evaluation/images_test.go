package evaluation

import "testing"

// The pooled values are those of scikit-learn's roc_auc_score, average_precision_score and roc_curve.
func TestJudgeImages(t *testing.T) {
	scores := [][]float64{{0.9, 0.8, 0.7, 0.55}, {0.4, 0.8, 0.35, 0.6}, {0.5, 0.4, 0.4, 0.2}}
	wrong := [][]bool{{true, true, false, false}, {true, true, true, false}, {false, false, false, false}}
	level := JudgeImages(scores, wrong)
	closeTo(t, "AUROC", level.AUROC.Value, 0.6857142857142857)
	closeTo(t, "AUPRC", *level.AUPRC, 0.7709090909090908)
	closeTo(t, "TPR", *level.TPR, 0.6)
	closeTo(t, "within", level.Within.Value, (1+1./3)/2) // the third cell has no wrong image
	if level.Cells != 2 || !(level.AUROC.Low < level.AUROC.Value && level.AUROC.Value < level.AUROC.High) {
		t.Errorf("level is %+v", level)
	}
	if one := JudgeImages(scores[2:], wrong[2:]); one.AUROC != nil || one.AUPRC != nil || one.TPR != nil ||
		one.Within != nil {
		t.Errorf("right images only give %+v", one)
	}
}
