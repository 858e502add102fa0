// Package evaluation runs requests through an ensemble and judges the scores: do they find under-sampled classes, and
// do they rank the requests of one class by their error? Intervals are 95%. They resample cells (a class in a
// rotation), because the requests of one cell are not independent.
package evaluation

import (
	"math"
	"math/rand/v2"
	"slices"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/integrate"
	"gonum.org/v1/gonum/stat"
)

// Replicates is the number of times an interval resamples the cells.
const Replicates = 400

// Cell is one class in one rotation.
type Cell struct {
	Rotation int
	Class    int
	Bin      float64 // training images of the class in this rotation, the mean of the components
}

// Estimate is a number with its 95% interval.
type Estimate struct {
	Value float64 `json:"value"`
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
}

// Bins returns the bins of cells, smallest first.
func Bins(cells []Cell) []float64 {
	var bins []float64
	for _, c := range cells {
		bins = append(bins, c.Bin)
	}
	slices.Sort(bins)
	return slices.Compact(bins)
}

// roc returns the curve of "positive scores above negative": rates of true and false positives from (0, 0) to (1, 1),
// one point for each distinct value.
func roc(positive, negative []float64) (tpr, fpr []float64) {
	y := slices.Concat(positive, negative)
	classes := make([]bool, len(y))
	for i := range positive {
		classes[i] = true
	}
	stat.SortWeightedLabeled(y, classes, nil)
	tpr, fpr, _ = stat.ROC(nil, y, classes, nil)
	return tpr, fpr
}

// AUROC returns the probability that a positive scores above a negative, ties counted half; NaN if either is empty.
func AUROC(positive, negative []float64) float64 {
	if len(positive) == 0 || len(negative) == 0 {
		return math.NaN()
	}
	tpr, fpr := roc(positive, negative)
	return integrate.Trapezoidal(fpr, tpr)
}

// AUPRC returns the average precision: the sum over thresholds of precision times the recall gained, in [0, 1];
// NaN if either is empty.
func AUPRC(positive, negative []float64) float64 {
	if len(positive) == 0 || len(negative) == 0 {
		return math.NaN()
	}
	tpr, fpr := roc(positive, negative)
	sum := 0.0
	for i := 1; i < len(tpr); i++ {
		found, false_ := tpr[i]*float64(len(positive)), fpr[i]*float64(len(negative))
		sum += (tpr[i] - tpr[i-1]) * found / (found + false_)
	}
	return sum
}

// TPR returns the largest share of positives above a threshold that at most a share fpr of the negatives passes; NaN
// if either is empty.
func TPR(positive, negative []float64, fpr float64) float64 {
	if len(positive) == 0 || len(negative) == 0 {
		return math.NaN()
	}
	found, passed := roc(positive, negative)
	best := 0.0
	for i := range found {
		if passed[i] <= fpr {
			best = max(best, found[i])
		}
	}
	return best
}

// Ranks returns the ranks of values from 1, ties sharing their mean.
func Ranks(values []float64) []float64 {
	sorted, order := slices.Clone(values), make([]int, len(values))
	floats.ArgsortStable(sorted, order)
	ranks := make([]float64, len(values))
	for from := 0; from < len(sorted); {
		to := from + 1
		for to < len(sorted) && sorted[to] == sorted[from] {
			to++
		}
		for _, i := range order[from:to] {
			ranks[i] = float64(from+to+1) / 2
		}
		from = to
	}
	return ranks
}

// Spearman returns the rank correlation of two lists of equal length; NaN if one is constant.
func Spearman(a, b []float64) float64 { return stat.Correlation(Ranks(a), Ranks(b), nil) }

// pooled returns the values of the cells of a bin, cell by cell.
func pooled(cells []Cell, values [][]float64, bin float64) (groups [][]float64) {
	for i, c := range cells {
		if c.Bin == bin {
			groups = append(groups, values[i])
		}
	}
	return groups
}

// random returns a generator with a fixed seed: equal input gives an equal interval.
func random() *rand.Rand { return rand.New(rand.NewPCG(0, 0)) } //nolint:gosec // resampling, not a secret

// interval returns the value with the 2.5% and 97.5% quantiles of the draws.
func interval(value float64, draws []float64) Estimate {
	slices.Sort(draws)
	return Estimate{value, stat.Quantile(0.025, stat.LinInterp, draws, nil),
		stat.Quantile(0.975, stat.LinInterp, draws, nil)}
}

// resampled returns as many groups, drawn with replacement.
func resampled(r *rand.Rand, groups [][]float64) []float64 {
	var values []float64
	for range groups {
		values = append(values, groups[r.IntN(len(groups))]...)
	}
	return values
}

// AUROCByBin returns the AUROC of the requests of a bin against the requests of the largest bin. The interval resamples
// the cells of each. Scores are [cells][seeds].
func AUROCByBin(cells []Cell, scores [][]float64, bin float64) Estimate {
	bins := Bins(cells)
	rare, well := pooled(cells, scores, bin), pooled(cells, scores, bins[len(bins)-1])
	r, draws := random(), make([]float64, Replicates)
	for i := range draws {
		draws[i] = AUROC(resampled(r, rare), resampled(r, well))
	}
	return interval(AUROC(slices.Concat(rare...), slices.Concat(well...)), draws)
}

// SameClass compares the requests of each class in one bin with the same class's requests in the largest bin. It
// returns the mean AUROC over the classes that are in both, how many of them reach 0.99, and their number. The mean is
// NaN if there are no such classes.
func SameClass(cells []Cell, scores [][]float64, bin float64) (mean float64, high, classes int) {
	bins := Bins(cells)
	rare, well := map[int][]float64{}, map[int][]float64{}
	for i, c := range cells {
		switch c.Bin {
		case bin:
			rare[c.Class] = append(rare[c.Class], scores[i]...)
		case bins[len(bins)-1]:
			well[c.Class] = append(well[c.Class], scores[i]...)
		}
	}
	sum := 0.0
	for class := range rare {
		if len(well[class]) == 0 {
			continue
		}
		v := AUROC(rare[class], well[class])
		sum += v
		classes++
		if v >= 0.99 {
			high++
		}
	}
	return sum / float64(classes), high, classes
}

// Against is how well scores separate one bin from the largest.
type Against struct {
	Bin       float64  `json:"bin"` // training images
	AUROC     Estimate `json:"auroc"`
	AUPRC     float64  `json:"auprc"`
	TPR       float64  `json:"tpr_at_1pct_fpr"`
	SameClass *float64 `json:"auroc_same_class"` // nil if no class is in both bins
	ClassesAt int      `json:"classes_at_99"`    // classes whose own AUROC is 0.99 or more
	Classes   int      `json:"classes"`          // classes in both bins
}

// BinMean is the mean of a bin.
type BinMean struct {
	Bin  float64  `json:"bin"`
	Mean Estimate `json:"mean"`
}

// ClassLevel is how well scores find under-sampled classes.
type ClassLevel struct {
	Against []Against `json:"against_largest"` // every bin but the largest
	Rho     *float64  `json:"rho_log_bin"`     // Spearman of score and log of bin; nil if either is constant
	Means   []BinMean `json:"mean_by_bin"`
}

// largest returns the bin with the most training images.
func (l ClassLevel) largest() float64 { return l.Means[len(l.Means)-1].Bin }

// JudgeClasses computes the class level of scores [cells][seeds]. Every cell holds a score.
func JudgeClasses(cells []Cell, scores [][]float64) ClassLevel {
	level := ClassLevel{Means: binMeans(cells, scores)}
	if len(cells) == 0 {
		return level
	}
	well := slices.Concat(pooled(cells, scores, level.largest())...)
	for _, bin := range Bins(cells) {
		if bin == level.largest() {
			continue
		}
		rare := slices.Concat(pooled(cells, scores, bin)...)
		a := Against{Bin: bin, AUROC: AUROCByBin(cells, scores, bin), AUPRC: AUPRC(rare, well), TPR: TPR(rare, well, 0.01)}
		mean, high, classes := SameClass(cells, scores, bin)
		a.SameClass, a.ClassesAt, a.Classes = number(mean), high, classes
		level.Against = append(level.Against, a)
	}
	var all, sizes []float64
	for i, c := range cells {
		for _, v := range scores[i] {
			all, sizes = append(all, v), append(sizes, c.Bin)
		}
	}
	level.Rho = number(Spearman(all, sizes)) // ranks of log bin are ranks of bin
	return level
}

// binMeans returns the mean of values [cells][seeds] in each bin, smallest bin first.
func binMeans(cells []Cell, values [][]float64) []BinMean {
	var means []BinMean
	for _, bin := range Bins(cells) {
		means = append(means, BinMean{bin, resampledMean(cellMeans(pooled(cells, values, bin)))})
	}
	return means
}

// RequestLevel is how well scores rank the requests of one class and bin by their error.
type RequestLevel struct {
	Within  *Estimate   `json:"within"`        // mean over cells of Spearman within the cell
	ByBin   []BinWithin `json:"within_by_bin"` //
	Overall *float64    `json:"overall"`       // Spearman over all requests
}

// BinWithin is the mean over a bin's cells of Spearman within the cell; nil if no cell has one.
type BinWithin struct {
	Bin    float64  `json:"bin"`
	Within *float64 `json:"within"`
}

// JudgeRequests computes the request level of scores and errors, both [cells][seeds]. Cells in which one of them is
// constant have no rank correlation and are left out.
func JudgeRequests(cells []Cell, scores, errors [][]float64) RequestLevel {
	var all []float64
	byBin := map[float64][]float64{}
	for i, c := range cells {
		if rho := Spearman(scores[i], errors[i]); !math.IsNaN(rho) {
			all, byBin[c.Bin] = append(all, rho), append(byBin[c.Bin], rho)
		}
	}
	level := RequestLevel{Overall: number(Spearman(slices.Concat(scores...), slices.Concat(errors...)))}
	if len(all) > 0 {
		within := resampledMean(all)
		level.Within = &within
	}
	for _, bin := range Bins(cells) {
		level.ByBin = append(level.ByBin, BinWithin{bin, number(stat.Mean(byBin[bin], nil))})
	}
	return level
}

func cellMeans(groups [][]float64) []float64 {
	means := make([]float64, len(groups))
	for i, g := range groups {
		means[i] = stat.Mean(g, nil)
	}
	return means
}

// resampledMean returns the mean of values with its interval.
func resampledMean(values []float64) Estimate {
	r, draws := random(), make([]float64, Replicates)
	for i := range draws {
		for range values {
			draws[i] += values[r.IntN(len(values))] / float64(len(values))
		}
	}
	return interval(stat.Mean(values, nil), draws)
}

// squaredDistance returns the squared Euclidean distance of two latents of one size.
func squaredDistance(a, b []float32) float64 {
	sum := 0.0
	for i := range a {
		d := float64(a[i]) - float64(b[i])
		sum += d * d
	}
	return sum
}

// number returns nil for NaN, which JSON does not have.
func number(v float64) *float64 {
	if math.IsNaN(v) {
		return nil
	}
	return &v
}
