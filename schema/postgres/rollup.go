package postgres

import (
	"slices"
	"time"

	"github.com/decuwatch/decuwatch/schema"
)

// classSums is what a row of class_hour_parts or class_day_parts sums, without its time.
type classSums struct {
	Model                string  `json:"model"`
	EnsembleDigest       string  `json:"ensemble_digest"`
	Settings             string  `json:"settings"`
	ClassIndex           int     `json:"class_index"`
	ClassLabel           string  `json:"class_label"`
	N                    int     `json:"n"`
	ClassGapSum          float64 `json:"class_gap_sum"`
	ClassGapSquares      float64 `json:"class_gap_squares"`
	ClassGapMin          float64 `json:"class_gap_min"`
	ClassGapMax          float64 `json:"class_gap_max"`
	ClassGapSaturated    int     `json:"class_gap_saturated"`
	RequestRiskSum       float64 `json:"request_risk_sum"`
	RequestRiskSquares   float64 `json:"request_risk_squares"`
	RequestRiskMin       float64 `json:"request_risk_min"`
	RequestRiskMax       float64 `json:"request_risk_max"`
	RequestRiskSaturated int     `json:"request_risk_saturated"`
	Warnings             int     `json:"warnings"`
	Criticals            int     `json:"criticals"`
	Folded               bool    `json:"folded"`
}

// classHourRow is a row of class_hour_parts.
type classHourRow struct {
	Hour time.Time `json:"hour"`
	*classSums
}

// classDayRow is a row of class_day_parts.
type classDayRow struct {
	Day time.Time `json:"day"`
	*classSums
}

// outcomeHourRow is a row of outcome_hour_parts.
type outcomeHourRow struct {
	Hour    time.Time      `json:"hour,omitzero"` // zero: the hour of the recording
	Model   string         `json:"model"`
	Outcome schema.Outcome `json:"outcome"`
	Reason  string         `json:"reason"`
	N       int            `json:"n"`
}

// classKey is what one row sums over.
type classKey struct {
	time  time.Time
	of    schema.Series
	class int
}

// rollup sums the verdicts of one transaction.
type rollup struct {
	hours, days map[classKey]*classSums
	outcomes    map[outcomeHourRow]int
}

func newRollup() rollup {
	return rollup{map[classKey]*classSums{}, map[classKey]*classSums{}, map[outcomeHourRow]int{}}
}

// add counts the verdict of a call. Canaries count as verdicts only.
func (r rollup) add(c *call) {
	if c.score != nil && !c.canary {
		addClass(r.hours, time.Hour, c.score, c.alerts)
		addClass(r.days, 24*time.Hour, c.score, c.alerts)
	}
	row := outcomeHourRow{Outcome: c.result.Outcome, Reason: c.result.Reason}
	if c.event != nil {
		row.Hour, row.Model = c.event.EventTime.UTC().Truncate(time.Hour), c.event.Model
	}
	if c.deadLetter != nil {
		row.Model = text(c.deadLetter.Model)
	}
	r.outcomes[row]++
}

// insert adds the statements that write the sums.
func (r rollup) insert(b *batch) {
	hours, days := make([]classHourRow, 0, len(r.hours)), make([]classDayRow, 0, len(r.days))
	for key, sums := range r.hours {
		hours = append(hours, classHourRow{key.time, sums})
	}
	for key, sums := range r.days {
		days = append(days, classDayRow{key.time, sums})
	}
	outcomes := make([]outcomeHourRow, 0, len(r.outcomes))
	for row, n := range r.outcomes {
		row.N = n
		outcomes = append(outcomes, row)
	}
	insert(b, "class_hour_parts", "", hours)
	insert(b, "class_day_parts", "", days)
	addRows(b, insertOutcomes, outcomes)
}

func addClass(sums map[classKey]*classSums, span time.Duration, s *scoreRow, alerts []alertRow) {
	of := schema.Series{Model: s.Model, EnsembleDigest: s.EnsembleDigest, Settings: s.Settings}
	key := classKey{s.EventTime.UTC().Truncate(span), of, s.ClassIndex}
	row := sums[key]
	if row == nil {
		row = &classSums{
			Model: s.Model, EnsembleDigest: s.EnsembleDigest, Settings: s.Settings,
			ClassIndex: s.ClassIndex, ClassLabel: s.ClassLabel,
			ClassGapMin: s.ClassGap, ClassGapMax: s.ClassGap, RequestRiskMin: s.RequestRisk, RequestRiskMax: s.RequestRisk,
		}
		sums[key] = row
	}
	row.N++
	row.ClassGapSum += s.ClassGap
	row.ClassGapSquares += s.ClassGap * s.ClassGap
	row.ClassGapMin, row.ClassGapMax = min(row.ClassGapMin, s.ClassGap), max(row.ClassGapMax, s.ClassGap)
	row.RequestRiskSum += s.RequestRisk
	row.RequestRiskSquares += s.RequestRisk * s.RequestRisk
	row.RequestRiskMin, row.RequestRiskMax = min(row.RequestRiskMin, s.RequestRisk), max(row.RequestRiskMax, s.RequestRisk)
	row.ClassGapSaturated += one(s.ClassGapSaturated)
	row.RequestRiskSaturated += one(s.RequestRiskSaturated)
	has := func(of schema.Severity) bool {
		return slices.ContainsFunc(alerts, func(a alertRow) bool { return a.Severity == of })
	}
	row.Warnings += one(has(schema.SeverityWarn))
	row.Criticals += one(has(schema.SeverityCritical))
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}
