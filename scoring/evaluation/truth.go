package evaluation

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"gonum.org/v1/gonum/floats"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// truth is a judge that an evaluation believes: it says which images are of the class asked for. It is another judge
// than the ensemble's own.
type truth struct {
	*ensemble.Judge
	dir    string
	graph  []byte
	digest string // SHA-256 of the graph, lower-case hex
}

// openTruth reads judge.json and judge.onnx of a directory, which must fit the images and classes of the ensemble.
func openTruth(dir string, e *ensemble.Ensemble) (truth, error) {
	t := truth{dir: dir}
	document, err := os.ReadFile(filepath.Join(dir, "judge.json"))
	if err != nil {
		return t, err
	}
	if t.graph, err = os.ReadFile(filepath.Join(dir, "judge.onnx")); err != nil {
		return t, err
	}
	if t.Judge, err = ensemble.ReadJudge(document, t.graph, &e.Manifest); err != nil {
		return t, fmt.Errorf("truth %s: %w", dir, err)
	}
	sum := sha256.Sum256(t.graph)
	t.digest = hex.EncodeToString(sum[:])
	return t, t.independent(e)
}

// independent returns an error if the truth is the ensemble's own judge.
func (t truth) independent(e *ensemble.Ensemble) error {
	if e.Files.Judge != nil && e.Files.Judge.SHA256 == t.digest {
		return settings.Errorf("truth %s is the judge of ensemble %s itself, must be an independent one", t.dir, e.Dir)
	}
	return nil
}

// mostLikely returns the most likely class, or -1 if an image of no class is more likely.
func mostLikely(probabilities []float64) int {
	class := floats.MaxIdx(probabilities)
	if probabilities[class] < 1-floats.Sum(probabilities) {
		return -1
	}
	return class
}
