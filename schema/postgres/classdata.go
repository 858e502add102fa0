package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// ClassData is what the manifest of an ensemble says about one of its classes. What it does not say is nil.
type ClassData struct {
	Model          string `json:"model"`
	EnsembleDigest string `json:"ensemble_digest"`
	ClassIndex     int    `json:"class_index"`
	ClassLabel     string `json:"class_label"`

	Draws         *int     `json:"draws"`          // training examples that the producer's row was drawn for
	ClassGap      *float64 `json:"class_gap"`      // mean distance that the closed form expects
	JudgeAccuracy *float64 `json:"judge_accuracy"` // on held-out images
	JudgeHeldOut  *int     `json:"judge_held_out"` // images that it was measured on

	// The data card; all are nil if nobody inspected the images.
	Images              *int     `json:"images"`
	DistinctImages      *int     `json:"distinct_images"`
	NEff                *float64 `json:"n_eff"` // how many different images they are worth
	NearDuplicates      *int     `json:"near_duplicates"`
	NearDuplicateGroups *int     `json:"near_duplicate_groups"`
	NeighborLabelShare  *float64 `json:"neighbor_label_share"`
	LikelyMislabeled    *int     `json:"likely_mislabeled"`
	Outliers            *int     `json:"outliers"`
}

// AddClassData writes what is known about classes. A class of an ensemble that is there stays as it is: the digest of
// the ensemble covers what its manifest says.
func (s *Store) AddClassData(ctx context.Context, classes []ClassData) error {
	return s.begin(ctx, "write the data of classes", func(tx pgx.Tx) error {
		b := &batch{}
		insert(b, "class_data", "ON CONFLICT DO NOTHING", classes)
		return b.send(ctx, tx)
	})
}

// ClassData returns what is known about some classes of an ensemble, by class. It leaves out classes of which nothing
// is known.
func (s *Store) ClassData(ctx context.Context, model, ensembleDigest string, classes []int) (map[int]ClassData, error) {
	found, err := list(ctx, s.pool, pgx.RowTo[ClassData], classData, model, ensembleDigest, classes)
	if err != nil {
		return nil, fmt.Errorf("read the data of classes: %w", err)
	}
	data := map[int]ClassData{}
	for _, c := range found {
		data[c.ClassIndex] = c
	}
	return data, nil
}
