package app

import (
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// classData returns what the manifests of the ensembles say about their classes. Manifests of format 1 say nothing.
func classData(engines []*scoring.Engine) []postgres.ClassData {
	var list []postgres.ClassData
	for _, engine := range engines {
		e := engine.Ensemble()
		if e.Format != ensemble.Format2 {
			continue
		}
		for i, c := range e.Classes {
			d := postgres.ClassData{
				Model: e.Name, EnsembleDigest: e.Digest, ClassIndex: i, ClassLabel: c.Label, Draws: &c.Draws,
				ClassGap: c.ClassGap,
			}
			if e.Judge != nil {
				d.JudgeAccuracy, d.JudgeHeldOut = e.Judge.Accuracy[i], &e.Judge.HeldOut[i]
			}
			if card := c.Data; card != nil {
				d.Images, d.DistinctImages, d.NEff = &card.Images, &card.Distinct, &card.NEff
				d.NearDuplicates, d.NearDuplicateGroups = &card.NearDuplicates, &card.NearDuplicateGroups
				d.NeighborLabelShare, d.LikelyMislabeled = card.NeighborLabelShare, &card.LikelyMislabeled
				d.Outliers = &card.Outliers
			}
			list = append(list, d)
		}
	}
	return list
}
