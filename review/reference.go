package review

import (
	"context"
	"fmt"

	"github.com/decuwatch/decuwatch/schema/postgres"
)

const (
	referenceImages = 4   // of a class
	referenceSide   = 128 // pixels of their longer side, at most
	referencesKept  = 256 // classes whose images a worker keeps for its next jobs
)

// classKey names a class of an ensemble.
type classKey struct {
	digest string
	class  int
}

// reference returns images that the ensemble's reference makes of a class: what a reviewer compares a request with.
// They are the same for every request of the class. It returns no image if the ensemble has no reference.
func (w *Worker) reference(ctx context.Context, engine Gatherer, class int) ([]postgres.EvidenceFile, error) {
	key := classKey{engine.Ensemble().Digest, class}
	w.known.Lock()
	list, ok := w.references[key]
	w.known.Unlock()
	if ok {
		return list, nil
	}
	images, err := engine.ClassImages(ctx, class, referenceImages)
	if err != nil {
		return nil, fmt.Errorf("reference images of class %d: %w", class, err)
	}
	for i, pixels := range images {
		body, err := encodeImage(pixels, engine.Ensemble().Image, min(w.config.ImageSide, referenceSide))
		if err != nil {
			return nil, fmt.Errorf("reference image %d of class %d: %w", i, class, err)
		}
		list = append(list, postgres.EvidenceFile{
			Name: fmt.Sprint(fileReference, i), ContentType: "image/png", Body: body,
		})
	}
	w.known.Lock()
	defer w.known.Unlock()
	if len(w.references) >= referencesKept {
		clear(w.references)
	}
	w.references[key] = list
	return list, nil
}
