package review

import (
	"fmt"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// likely is a class that a judge finds likely.
type likely struct {
	Label       string
	Probability float64
	Asked       bool // it is the class that was asked for
}

// concerned returns the classes whose data a review shows: its own, and those that the judge finds likely.
func concerned(r postgres.Review, s *schema.Score) []int {
	classes := []int{r.ClassIndex}
	if s != nil && s.ImageRisk != nil {
		for _, c := range s.ImageRisk.Top {
			classes = append(classes, c.Class)
		}
	}
	return classes
}

// verdict returns the classes that the judge finds most likely, the most likely first; nil without a judge.
func (d Details) verdict() []likely {
	if d.Score == nil || d.Score.ImageRisk == nil {
		return nil
	}
	var list []likely
	for _, c := range d.Score.ImageRisk.Top {
		label := fmt.Sprintf("class %d", c.Class)
		if known, ok := d.classes[c.Class]; ok {
			label = known.ClassLabel
		}
		list = append(list, likely{label, c.Probability, c.Class == d.ClassIndex})
	}
	return list
}

// unmeasured is a measurement that the score lacks, and why.
type unmeasured struct {
	Name schema.MeasurementName
	Why  string
}

// Unmeasured returns the measurements that the score lacks, if it is known why.
func (d Details) Unmeasured() []unmeasured {
	if d.Score == nil {
		return nil
	}
	var list []unmeasured
	for _, missing := range d.Score.Unmeasured() {
		if why := d.why(missing.Reason); why != "" {
			list = append(list, unmeasured{missing.Name, why})
		}
	}
	return list
}

// why returns the words of a reason, or "" if it is unknown.
func (d Details) why(reason schema.UnmeasuredReason) string {
	switch reason {
	case schema.BelowCut:
		return "not measured: the class gap is below the cut of the cascade"
	case schema.NoJudge:
		return "not measured: the ensemble has no judge"
	case schema.JudgeCannotTell:
		if accuracy := d.classes[d.ClassIndex].JudgeAccuracy; accuracy != nil {
			return fmt.Sprintf("not measured: the judge cannot tell this class (accuracy %.2f)", *accuracy)
		}
		return "not measured: the judge cannot tell this class (its accuracy is unknown)"
	case schema.NotFinite:
		return "not measured: the image, or what the judge said of it, is not finite"
	default:
		return ""
	}
}

// TrainingData says in one sentence what the class was trained on. It returns "" if nobody inspected the images.
func (d Details) TrainingData() string {
	data := d.classes[d.ClassIndex]
	if data.Images == nil || data.NEff == nil {
		return ""
	}
	text := fmt.Sprintf("n_eff %.3g of %d images", *data.NEff, *data.Images)
	if data.LikelyMislabeled != nil {
		text += fmt.Sprintf("; %d look mislabeled", *data.LikelyMislabeled)
	}
	return text
}
