package schema

import (
	"strconv"
	"time"
)

// TypeReview is the type of the CloudEvents that carry the verdicts of reviewers.
const TypeReview = "io.decuwatch.uncertainty.review.v1"

// LabelCanary marks a canary event. Statistics and review do not trust the label, because anybody can set it: they
// leave out the events of the table of canaries.
const LabelCanary = "decuwatch.canary"

// Review is the data of a review event: a reviewer's verdict on one request, or its withdrawal.
type Review struct {
	ReviewID    string        `json:"review_id"`
	AlertID     string        `json:"alert_id,omitempty"`  // most severe; empty for a request that was drawn at random
	AlertIDs    []string      `json:"alert_ids,omitempty"` // of all alerts on the request, the most severe first
	Version     int           `json:"version"`             // of the review; a greater one is newer
	State       ReviewState   `json:"state"`               // resolved, or open if an earlier verdict was withdrawn
	Verdict     ReviewVerdict `json:"verdict,omitempty"`   // empty if it was withdrawn
	Reviewer    string        `json:"reviewer"`
	Comment     string        `json:"comment,omitempty"`
	Source      string        `json:"source"` // of the event
	EventID     string        `json:"event_id"`
	EventTime   time.Time     `json:"event_time"`
	Model       string        `json:"model"`
	ClassIndex  int           `json:"class_index"`
	ClassLabel  string        `json:"class_label"`
	ClassGap    float64       `json:"class_gap"`
	RequestRisk *float64      `json:"request_risk"` // nil if it was not measured
	ImageRisk   *float64      `json:"image_risk"`   // nil if it was not measured
	At          time.Time     `json:"at"`
}

// ReviewSubject returns uncertainty.review.<model>.
func ReviewSubject(r Review) string { return "uncertainty.review." + r.Model }

// ReviewMessageID returns the identifier of a review event, the same on every try: review id and version.
func ReviewMessageID(r Review) string { return r.ReviewID + "." + strconv.Itoa(r.Version) }

// EncodeReview returns the message of a review event, a CloudEvent in structured mode, for the subject
// ReviewSubject(r). It fails if the review holds a number that JSON cannot carry.
func EncodeReview(r Review) (header map[string][]string, payload []byte, err error) {
	return encodeData(structured{
		Type: TypeReview, Source: "/decuwatch/" + r.Model, ID: ReviewMessageID(r), Subject: r.EventID, Data: r,
	}, r.At)
}

// DecodeReview reads a review from a message that EncodeReview made, in a subscriber. It ignores unknown fields. The
// error is an *Invalid.
func DecodeReview(payload []byte) (Review, error) { return decodeData[Review](payload, TypeReview) }
