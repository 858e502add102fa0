package schema

import "time"

// HeldBack counts alerts of one class and hour that were stored but, for the volume that is allowed, not sent.
type HeldBack struct {
	Hour        time.Time // begin of the hour in which they were recorded, UTC
	Model       string
	ClassIndex  int
	ClassLabel  string
	Severity    Severity
	ClassBudget int // beyond the class's budget
	ModelBudget int // beyond the model's budget
	CoolDown    int // repeated one that was sent shortly before
}

// ClassSequence is one measurement of the newest scores of a class, in order of event time.
type ClassSequence struct {
	ClassIndex int
	ClassLabel string
	Last       string // source and id of the newest event, a space between
	Times      []time.Time
	Values     []float64
	Weights    []float64 // requests that each score stands for
}

// ClassDistance is the mean distance of the class gap of some scores of a class.
type ClassDistance struct {
	ClassIndex int
	ClassLabel string
	N          int // scores
	Distance   float64
}
