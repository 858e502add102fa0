package consumers

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// ErrStreamConfig is returned by [EnsureStream] and [Runner.Run] if a stream exists whose settings can erase, replace,
// expire or add messages. Its text names the setting, its value, and what is allowed.
var ErrStreamConfig = errors.New("consumers: the stream's settings would lose events")

// ErrConsumerConfig is wrapped by the error of [Runner.Settings] if a model's consumer has settings with which it would
// not get all events of the model, and the server does not let the worker restore them.
var ErrConsumerConfig = errors.New("consumers: the consumer's settings would lose events")

// minMaxAge is the shortest max_age that a stream of events may have.
const minMaxAge = time.Minute

// setting is a rule about one setting of a stream. Its name is the one in the server's API.
type setting struct {
	name    string
	value   func(jetstream.StreamConfig) any
	allowed string
	ok      func(jetstream.StreamConfig) bool
}

// off is the rule that a setting must not be set.
func off(name string, value func(jetstream.StreamConfig) bool) setting {
	return setting{name, func(c jetstream.StreamConfig) any { return value(c) }, "false",
		func(c jetstream.StreamConfig) bool { return !value(c) }}
}

// eventSettings are the settings of the stream of events with which an acknowledged event can be lost, or a message can
// appear that no producer published. A test compares them with all fields of the server's configuration.
var eventSettings = append([]setting{
	{"subjects", func(c jetstream.StreamConfig) any { return c.Subjects }, fmt.Sprintf("%q alone", subjectPrefix+">"),
		func(c jetstream.StreamConfig) bool { return slices.Equal(c.Subjects, []string{subjectPrefix + ">"}) }},
	{"retention", func(c jetstream.StreamConfig) any { return c.Retention }, "limits",
		func(c jetstream.StreamConfig) bool { return c.Retention == jetstream.LimitsPolicy }},
	{"discard", func(c jetstream.StreamConfig) any { return c.Discard }, "new",
		func(c jetstream.StreamConfig) bool { return c.Discard == jetstream.DiscardNew }},
	{"max_msgs_per_subject", func(c jetstream.StreamConfig) any { return c.MaxMsgsPerSubject },
		"unlimited, unless discard_new_per_subject is set",
		func(c jetstream.StreamConfig) bool { return c.MaxMsgsPerSubject <= 0 || c.DiscardNewPerSubject }},
	{"max_age", func(c jetstream.StreamConfig) any { return c.MaxAge },
		fmt.Sprintf("0 (unlimited) or at least %s", minMaxAge),
		func(c jetstream.StreamConfig) bool { return c.MaxAge == 0 || c.MaxAge >= minMaxAge }},
}, everyStream...)

// advisorySettings are the settings of the stream of the server's advisories, which may drop its oldest messages.
var advisorySettings = append([]setting{
	{"retention", func(c jetstream.StreamConfig) any { return c.Retention }, "limits",
		func(c jetstream.StreamConfig) bool { return c.Retention == jetstream.LimitsPolicy }},
	{"max_age", func(c jetstream.StreamConfig) any { return c.MaxAge },
		fmt.Sprintf("0 (unlimited) or at least %s", minMaxAge),
		func(c jetstream.StreamConfig) bool { return c.MaxAge == 0 || c.MaxAge >= minMaxAge }},
}, everyStream...)

// everyStream are the settings that all streams share.
var everyStream = []setting{
	{"storage", func(c jetstream.StreamConfig) any { return c.Storage }, "file",
		func(c jetstream.StreamConfig) bool { return c.Storage == jetstream.FileStorage }},
	{"mirror", func(c jetstream.StreamConfig) any { return sourceName(c.Mirror) }, "unset",
		func(c jetstream.StreamConfig) bool { return c.Mirror == nil }},
	{"sources", func(c jetstream.StreamConfig) any { return sourceNames(c.Sources) }, "empty",
		func(c jetstream.StreamConfig) bool { return len(c.Sources) == 0 }},
	{"subject_transform", func(c jetstream.StreamConfig) any { return transformText(c.SubjectTransform) }, "unset",
		func(c jetstream.StreamConfig) bool { return c.SubjectTransform == nil }},
	{"subject_delete_marker_ttl", func(c jetstream.StreamConfig) any { return c.SubjectDeleteMarkerTTL }, "0",
		func(c jetstream.StreamConfig) bool { return c.SubjectDeleteMarkerTTL == 0 }},
	{"persist_mode", func(c jetstream.StreamConfig) any { return c.PersistMode }, "default",
		func(c jetstream.StreamConfig) bool { return c.PersistMode == jetstream.DefaultPersistMode }},
	{"consumer_limits", func(c jetstream.StreamConfig) any {
		return fmt.Sprintf("inactive_threshold %s", c.ConsumerLimits.InactiveThreshold)
	}, "inactive_threshold 0s", func(c jetstream.StreamConfig) bool { return c.ConsumerLimits.InactiveThreshold == 0 }},
	off("no_ack", func(c jetstream.StreamConfig) bool { return c.NoAck }),
	off("sealed", func(c jetstream.StreamConfig) bool { return c.Sealed }),
	off("allow_rollup_hdrs", func(c jetstream.StreamConfig) bool { return c.AllowRollup }),
	off("allow_msg_ttl", func(c jetstream.StreamConfig) bool { return c.AllowMsgTTL }),
	off("allow_msg_counter", func(c jetstream.StreamConfig) bool { return c.AllowMsgCounter }),
	off("allow_msg_schedules", func(c jetstream.StreamConfig) bool { return c.AllowMsgSchedules }),
}

// checkSettings returns an [ErrStreamConfig] that names each setting of c that breaks one of the rules.
func checkSettings(c jetstream.StreamConfig, rules []setting) error {
	var errs []error
	for _, s := range rules {
		if !s.ok(c) {
			errs = append(errs, fmt.Errorf("%w: stream %s: %s is %v, must be %s",
				ErrStreamConfig, c.Name, s.name, s.value(c), s.allowed))
		}
	}
	return errors.Join(errs...)
}

// checkStream checks the stream of events, also against the settings of this worker.
func (c Config) checkStream(s jetstream.StreamConfig) error {
	err := checkSettings(s, eventSettings)
	if s.MaxAge > 0 && s.MaxAge <= c.OrphanGrace {
		err = errors.Join(err, fmt.Errorf("%w: stream %s: max_age is %s, must be above consumers.orphan-grace, %s: "+
			"an orphaned event would expire before it becomes a dead letter",
			ErrStreamConfig, s.Name, s.MaxAge, c.OrphanGrace))
	}
	if limit := s.ConsumerLimits.MaxAckPending; limit > 0 && limit < c.maxAckPending() {
		err = errors.Join(err, fmt.Errorf("%w: stream %s: consumer_limits.max_ack_pending is %d, "+
			"must be 0 or at least %d: no consumer can be made",
			ErrStreamConfig, s.Name, limit, c.maxAckPending()))
	}
	return err
}

// weaknesses returns what an operator should know about a stream that is accepted.
func weaknesses(c jetstream.StreamConfig) []string {
	var list []string
	if !c.DenyDelete {
		list = append(list, "deny_delete is false: whoever may call STREAM.MSG.DELETE can erase single events")
	}
	if c.DenyPurge {
		list = append(list, "deny_purge is true: settled events stay until max_age, and a full stream refuses producers")
	}
	if c.MaxConsumers <= 0 {
		list = append(list, "max_consumers is unlimited: whoever may create consumers can exhaust the server")
	}
	return list
}

func sourceName(s *jetstream.StreamSource) string {
	if s == nil {
		return ""
	}
	return s.Name
}

func sourceNames(list []*jetstream.StreamSource) []string {
	var names []string
	for _, s := range list {
		names = append(names, sourceName(s))
	}
	return names
}

func transformText(t *jetstream.SubjectTransformConfig) string {
	if t == nil {
		return ""
	}
	return fmt.Sprintf("%q to %q", t.Source, t.Destination)
}

// checkConsumer returns an error that names each setting with which a consumer would skip events, acknowledge them
// unseen, give them to nobody, or be deleted. A pause is an operator's decision and is reported separately.
func checkConsumer(got jetstream.ConsumerConfig, subject string) error {
	filters := got.FilterSubjects
	if got.FilterSubject != "" {
		filters = append(filters, got.FilterSubject)
	}
	var errs []error
	for _, s := range []struct {
		name      string
		got, want any
		ok        bool
	}{
		{"filter_subject", filters, subject, slices.Equal(filters, []string{subject})},
		{"ack_policy", got.AckPolicy, jetstream.AckExplicitPolicy, got.AckPolicy == jetstream.AckExplicitPolicy},
		{"deliver_policy", got.DeliverPolicy, jetstream.DeliverAllPolicy, got.DeliverPolicy == jetstream.DeliverAllPolicy},
		{"deliver_subject", got.DeliverSubject, `""`, got.DeliverSubject == ""},
		{"replay_policy", got.ReplayPolicy, jetstream.ReplayInstantPolicy, got.ReplayPolicy == jetstream.ReplayInstantPolicy},
		{"headers_only", got.HeadersOnly, false, !got.HeadersOnly},
		{"mem_storage", got.MemoryStorage, false, !got.MemoryStorage},
		{"inactive_threshold", got.InactiveThreshold, time.Duration(0), got.InactiveThreshold == 0},
		{"priority_groups", got.PriorityGroups, "empty", len(got.PriorityGroups) == 0},
		{"max_batch", got.MaxRequestBatch, 0, got.MaxRequestBatch == 0},
		{"max_expires", got.MaxRequestExpires, time.Duration(0), got.MaxRequestExpires == 0},
		{"max_bytes", got.MaxRequestMaxBytes, 0, got.MaxRequestMaxBytes == 0},
		{"rate_limit_bps", got.RateLimit, 0, got.RateLimit == 0},
	} {
		if !s.ok {
			errs = append(errs, fmt.Errorf("%w: consumer %s: %s is %v, must be %v",
				ErrConsumerConfig, got.Durable, s.name, s.got, s.want))
		}
	}
	return errors.Join(errs...)
}
