package evaluation

import (
	"math"
	"slices"
)

// ImageLevel is how well scores find images that are not of the class asked for. All numbers are nil if there are no
// wrong images, or no right ones.
type ImageLevel struct {
	AUROC  *Estimate `json:"auroc"` // over all requests; the interval resamples cells
	AUPRC  *float64  `json:"auprc"`
	TPR    *float64  `json:"tpr_at_5pct_fpr"`
	Within *Estimate `json:"within"`       // mean over cells of the AUROC within the cell
	Cells  int       `json:"within_cells"` // cells with wrong and right images, which the mean is over
}

// JudgeImages computes the image level of scores [cells][seeds]. Wrong says which images are not of the class asked
// for. Cells in which all images are wrong, or all right, have no AUROC of their own.
func JudgeImages(scores [][]float64, wrong [][]bool) ImageLevel {
	positive, negative := make([][]float64, len(scores)), make([][]float64, len(scores))
	var within []float64
	for i := range scores {
		for k, v := range scores[i] {
			if wrong[i][k] {
				positive[i] = append(positive[i], v)
			} else {
				negative[i] = append(negative[i], v)
			}
		}
		if v := AUROC(positive[i], negative[i]); !math.IsNaN(v) {
			within = append(within, v)
		}
	}
	p, n := slices.Concat(positive...), slices.Concat(negative...)
	level := ImageLevel{AUPRC: number(AUPRC(p, n)), TPR: number(TPR(p, n, 0.05)), Cells: len(within)}
	if len(within) > 0 {
		mean := resampledMean(within)
		level.Within = &mean
	}
	if value := AUROC(p, n); !math.IsNaN(value) {
		pooled := interval(value, pooledAUROCs(positive, negative))
		level.AUROC = &pooled
	}
	return level
}

// pooledAUROCs returns the AUROC over all requests of resampled cells. Draws without positives or without negatives
// are left out.
func pooledAUROCs(positive, negative [][]float64) []float64 {
	r, draws := random(), make([]float64, 0, Replicates)
	for range Replicates {
		var p, n []float64
		for range positive {
			i := r.IntN(len(positive))
			p, n = append(p, positive[i]...), append(n, negative[i]...)
		}
		if v := AUROC(p, n); !math.IsNaN(v) {
			draws = append(draws, v)
		}
	}
	return draws
}
