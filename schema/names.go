package schema

import (
	"cmp"
	"slices"
	"strings"
)

// Severity is how urgent an alert is.
type Severity string

// Severities, the mildest first.
const (
	SeverityWarn     Severity = "warn"
	SeverityCritical Severity = "critical"
)

// Severities returns all severities, the mildest first.
func Severities() []Severity { return []Severity{SeverityWarn, SeverityCritical} }

// Compare returns -1 if s is milder than t, 1 if it is more severe, and 0 if they are the same.
func (s Severity) Compare(t Severity) int {
	return cmp.Compare(slices.Index(Severities(), s), slices.Index(Severities(), t))
}

// Scope is what a threshold applies to.
type Scope string

// Scopes of a threshold, the most specific first.
const (
	ScopeClass   Scope = "class"
	ScopeCluster Scope = "cluster" // set for each class of the cluster
	ScopeModel   Scope = "model"
	ScopeLimit   Scope = "limit" // absolute: applies in addition
)

// MeasurementName names a measurement of a score.
type MeasurementName string

// Measurements of a score.
const (
	ClassGap    MeasurementName = "class_gap"    // how little the ensemble knows this class
	RequestRisk MeasurementName = "request_risk" // how risky is this request within its class
	ImageRisk   MeasurementName = "image_risk"   // how likely is the image not of the class asked for
)

// UnmeasuredReason is why a score lacks a measurement.
type UnmeasuredReason string

// Reasons why a score lacks its request risk (the first) or its image risk.
const (
	BelowCut        UnmeasuredReason = "below_cut"         // its class gap is below the cut of the cascade
	NoJudge         UnmeasuredReason = "no_judge"          // the ensemble or its profile has no judge
	JudgeCannotTell UnmeasuredReason = "judge_cannot_tell" // the judge is not known to tell the class well enough
	NotFinite       UnmeasuredReason = "not_finite"        // decoder or judge gave a NaN or an infinity for this image
)

// MeasurementNames returns the names of the measurements of a score.
func MeasurementNames() []MeasurementName {
	return []MeasurementName{ClassGap, RequestRisk, ImageRisk}
}

// UnmeasuredReasons returns all reasons why a score lacks a measurement.
func UnmeasuredReasons() []UnmeasuredReason {
	return []UnmeasuredReason{BelowCut, NoJudge, JudgeCannotTell, NotFinite}
}

// AlertKind is what an alert is about.
type AlertKind string

// Kinds of alerts.
const (
	AlertScore            AlertKind = "score"             // one score
	AlertSummary          AlertKind = "summary"           // alerts of an hour that were held back
	AlertClassDrift       AlertKind = "class_drift"       // a class's scores rose above the model's distribution
	AlertThresholdMissing AlertKind = "threshold_missing" // the model has thresholds, but of other series only
	AlertCanaryMissed     AlertKind = "canary_missed"     // no alert fired on a canary
)

// Dispatch is whether an alert is sent, or why not.
type Dispatch string

// Dispatches of an alert. All but the first are stored only.
const (
	DispatchOwed        Dispatch = "owed"
	DispatchClassBudget Dispatch = "class_budget" // beyond the class's budget of the hour
	DispatchModelBudget Dispatch = "model_budget" // beyond the model's budget of the hour
	DispatchCoolDown    Dispatch = "cool_down"    // repeats one that was sent shortly before
	DispatchSilenced    Dispatch = "silenced"     // a silence is in force
)

// Reason is why an alert fired, or why it did not. The reason of an alert that is not about a score is its kind.
type Reason string

// Reasons of a decision on a score. The first four fire an alert.
const (
	ReasonClass   Reason = "class_threshold"   // the class's own threshold was reached
	ReasonCluster Reason = "cluster_threshold" // the class has no threshold; its cluster's was reached
	ReasonModel   Reason = "model_threshold"   // neither has a threshold; the model's was reached
	ReasonLimit   Reason = "absolute_limit"    // the absolute limit was reached
	ReasonBelow   Reason = "below_threshold"   // no threshold was reached
	ReasonNone    Reason = "no_threshold"      // the model has no threshold for this measurement
	ReasonStale   Reason = "stale_threshold"   // the model has thresholds, but of another ensemble or other settings
)

// Outcome is the kind of verdict on an event.
type Outcome string

// Outcomes of an event or a message.
const (
	OutcomeScore      Outcome = "score"
	OutcomeSkip       Outcome = "skip"
	OutcomeDeadLetter Outcome = "dead_letter"
	OutcomeRepeat     Outcome = "repeat" // of a message only: it repeats an event that has its verdict
)

// Purpose is why a score was made.
type Purpose string

// Purposes of a score.
const (
	PurposeLive    Purpose = "live"    // the verdict on its event
	PurposeShadow  Purpose = "shadow"  // by an ensemble that is served as a shadow
	PurposeRescore Purpose = "rescore" // somebody asked for it
)

// SkipReason is why an event was deliberately not scored.
type SkipReason string

// Reasons of a skip.
const (
	SkipSampler  SkipReason = "sampler"  // the event's sampler cannot be rerun
	SkipNoise    SkipReason = "noise"    // the event's first latent cannot be drawn again
	SkipSettings SkipReason = "settings" // the event's sampler settings cannot be rerun
	// The event was left out by lot: [Skip.InclusionProbability] says how likely it was to be scored.
	SkipSampledOut SkipReason = "sampled_out"
	// The model's row budget was used up. This is no random choice: estimates cover the other events only.
	SkipBudget SkipReason = "budget"
	SkipLatent SkipReason = "latent" // the latent that the event names is missing, or cannot be used
)

// SkipReasons returns all reasons of a skip.
func SkipReasons() []SkipReason {
	return []SkipReason{SkipSampler, SkipNoise, SkipSettings, SkipLatent, SkipSampledOut, SkipBudget}
}

// DeadLetterKind is why a message became a dead letter.
type DeadLetterKind string

// Kinds of dead letters.
const (
	KindInvalid      DeadLetterKind = "invalid"       // the message breaks the event's format or bounds
	KindUnknownModel DeadLetterKind = "unknown_model" // no worker has an ensemble for the model
	KindUnknownClass DeadLetterKind = "unknown_class" // the ensemble does not have the class
	KindDuplicateID  DeadLetterKind = "duplicate_id"  // source and id belong to another message
	KindNonFinite    DeadLetterKind = "non_finite"    // the backbone gave a NaN or an infinity
	KindFailed       DeadLetterKind = "failed"        // too many attempts on it failed
	KindGivenUp      DeadLetterKind = "given_up"      // its workers crashed, or somebody terminated it
	KindOrphaned     DeadLetterKind = "orphaned"      // its model has a consumer, but nobody pulls from it
)

// DeadLetterKinds returns all kinds of dead letters.
func DeadLetterKinds() []DeadLetterKind {
	return []DeadLetterKind{
		KindInvalid, KindUnknownModel, KindUnknownClass, KindDuplicateID, KindNonFinite, KindFailed, KindGivenUp,
		KindOrphaned,
	}
}

// Sink is the name of a receiver of alerts.
type Sink string

// Sinks by their default names.
const (
	SinkStream       Sink = "nats" // the JetStream stream of alerts: every alert is owed to it
	SinkWebhook      Sink = "webhook"
	SinkAlertmanager Sink = "alertmanager"
)

// ReviewState is the state of a review.
type ReviewState string

// States of a review.
const (
	ReviewOpen         ReviewState = "open"
	ReviewAcknowledged ReviewState = "acknowledged"
	ReviewResolved     ReviewState = "resolved"
)

// ReviewVerdict is a reviewer's verdict on a request.
type ReviewVerdict string

// Verdicts of a resolved review.
const (
	VerdictConfirmed  ReviewVerdict = "confirmed"   // the model does not understand the request
	VerdictFalseAlarm ReviewVerdict = "false_alarm" // nothing is wrong with the request
	VerdictExpected   ReviewVerdict = "expected"    // the same as confirmed, but known and accepted
)

// ReviewVerdicts returns all verdicts of a resolved review.
func ReviewVerdicts() []ReviewVerdict {
	return []ReviewVerdict{VerdictConfirmed, VerdictFalseAlarm, VerdictExpected}
}

// List returns the names, separated by commas.
func List[T ~string](names []T) string {
	texts := make([]string, len(names))
	for i, name := range names {
		texts[i] = string(name)
	}
	return strings.Join(texts, ", ")
}
