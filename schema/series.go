package schema

// Series is what makes scores comparable: the model, the ensemble and the settings that measured them. A threshold
// applies to the scores of its own series only.
type Series struct {
	Model          string `json:"model"`
	EnsembleDigest string `json:"ensemble_digest"`
	Settings       string `json:"settings"` // Receipt.Settings
}

// Series returns the series that the score belongs to.
func (s *Score) Series() Series {
	return Series{s.Event.Data.Model, s.Receipt.EnsembleDigest, s.Receipt.Settings}
}

// Series returns the series that the threshold applies to.
func (t *Threshold) Series() Series { return Series{t.Model, t.EnsembleDigest, t.Settings} }
