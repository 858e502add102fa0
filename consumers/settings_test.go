package consumers

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers/natstest"
)

// harmless are the settings of a stream that cannot lose an event or add a message, with the reason. Every other
// setting must have a rule in eventSettings.
var harmless = map[string]string{
	"name":                    "it is how the stream was found",
	"description":             "text",
	"max_consumers":           "a worker that cannot make its consumer says so",
	"max_msgs":                "with discard new, a full stream refuses producers",
	"max_bytes":               "with discard new, a full stream refuses producers",
	"discard_new_per_subject": "a full subject refuses producers",
	"max_msg_size":            "a larger message is refused to its producer",
	"num_replicas":            "an operator's choice",
	"duplicate_window":        "a duplicate carries a producer's own Nats-Msg-Id",
	"placement":               "where replicas live",
	"deny_delete":             "accepted with a warning: it permits an API call, and erases nothing by itself",
	"deny_purge":              "accepted with a warning: settled events stay longer",
	"compression":             "of the files",
	"first_seq":               "of a new stream",
	"republish":               "sends copies elsewhere and leaves the stream as it is",
	"allow_direct":            "a way to read",
	"mirror_direct":           "a way to read",
	"metadata":                "text",
	"template_owner":          "of servers that no longer exist",
	"allow_atomic":            "publishes several messages or none",
	"allow_batched":           "a way to publish",
}

// TestEveryStreamSettingIsClassified fails for a setting that a new NATS version adds, until somebody has decided
// whether it can lose an event.
func TestEveryStreamSettingIsClassified(t *testing.T) {
	ruled := map[string]bool{}
	for _, s := range eventSettings {
		ruled[s.name] = true
	}
	seen := map[string]bool{}
	for _, of := range []reflect.Type{reflect.TypeFor[jetstream.StreamConfig](), reflect.TypeFor[server.StreamConfig]()} {
		for i := range of.NumField() {
			name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
			seen[name] = true
			if _, ok := harmless[name]; ok == ruled[name] {
				t.Errorf("%s.%s (%s): has a rule: %t, is listed as harmless: %t; must be exactly one of them", of,
					of.Field(i).Name, name, ruled[name], ok)
			}
		}
	}
	for name := range ruled {
		if !seen[name] {
			t.Errorf("there is a rule on %q, which is no setting of a stream", name)
		}
	}
	for name := range harmless {
		if !seen[name] {
			t.Errorf("%q is no setting of a stream", name)
		}
	}
}

// TestDangerousStreamSettingsAreRefused changes one setting of an accepted stream at a time.
func TestDangerousStreamSettingsAreRefused(t *testing.T) {
	changes := map[string][]func(*jetstream.StreamConfig){
		"subjects": {
			func(c *jetstream.StreamConfig) { c.Subjects = []string{"generation.requested.fashion-mnist"} },
			func(c *jetstream.StreamConfig) { c.Subjects = append(c.Subjects, "other.>") },
		},
		"retention": {
			func(c *jetstream.StreamConfig) { c.Retention = jetstream.WorkQueuePolicy },
			func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy },
		},
		"discard":              {func(c *jetstream.StreamConfig) { c.Discard = jetstream.DiscardOld }},
		"max_msgs_per_subject": {func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = 5 }},
		"max_age": {
			func(c *jetstream.StreamConfig) { c.MaxAge, c.Duplicates = time.Second, time.Second },
			func(c *jetstream.StreamConfig) { c.MaxAge = 24 * time.Hour },
		},
		"storage": {func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage }},
		"mirror":  {func(c *jetstream.StreamConfig) { c.Mirror = &jetstream.StreamSource{Name: "OTHER"} }},
		"sources": {func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "OTHER"}} }},
		"subject_transform": {func(c *jetstream.StreamConfig) {
			c.SubjectTransform = &jetstream.SubjectTransformConfig{Source: ">", Destination: "a.>"}
		}},
		"subject_delete_marker_ttl": {func(c *jetstream.StreamConfig) { c.SubjectDeleteMarkerTTL = time.Minute }},
		"persist_mode":              {func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode }},
		"consumer_limits": {
			func(c *jetstream.StreamConfig) { c.ConsumerLimits.InactiveThreshold = time.Hour },
			func(c *jetstream.StreamConfig) { c.ConsumerLimits.MaxAckPending = 1 },
		},
		"no_ack":              {func(c *jetstream.StreamConfig) { c.NoAck = true }},
		"sealed":              {func(c *jetstream.StreamConfig) { c.Sealed = true }},
		"allow_rollup_hdrs":   {func(c *jetstream.StreamConfig) { c.AllowRollup = true }},
		"allow_msg_ttl":       {func(c *jetstream.StreamConfig) { c.AllowMsgTTL = true }},
		"allow_msg_counter":   {func(c *jetstream.StreamConfig) { c.AllowMsgCounter = true }},
		"allow_msg_schedules": {func(c *jetstream.StreamConfig) { c.AllowMsgSchedules = true }},
	}
	cfg := Config{Models: []string{"fashion-mnist"}}.withDefaults()
	good := jetstream.StreamConfig{Name: "GENERATION", Subjects: []string{"generation.requested.>"},
		Discard: jetstream.DiscardNew, MaxAge: 100 * time.Hour}
	if err := cfg.checkStream(good); err != nil {
		t.Errorf("a stream of an operator's own was refused: %v", err)
	}
	for _, s := range eventSettings {
		if len(changes[s.name]) == 0 {
			t.Errorf("no case breaks the rule on %s", s.name)
		}
		for _, change := range changes[s.name] {
			c := good
			change(&c)
			if err := cfg.checkStream(c); !errors.Is(err, ErrStreamConfig) || !strings.Contains(err.Error(), s.name) ||
				!strings.Contains(err.Error(), "must be") {
				t.Errorf("%s: error is %v, want one that names the setting and what it must be", s.name, err)
			}
		}
	}
	perSubject := good
	perSubject.MaxMsgsPerSubject, perSubject.DiscardNewPerSubject = 5, true
	if err := cfg.checkStream(perSubject); err != nil {
		t.Errorf("a stream that refuses new messages of a full subject was refused: %v", err)
	}
}

// TestServerKeepsDangerousSettings has the server create streams with the settings that a producer could use.
func TestServerKeepsDangerousSettings(t *testing.T) {
	js := natstest.Start(t).JetStream()
	for _, c := range []struct {
		setting string
		change  func(*jetstream.StreamConfig)
	}{
		{"allow_rollup_hdrs", func(c *jetstream.StreamConfig) { c.AllowRollup = true }},
		{"allow_msg_ttl", func(c *jetstream.StreamConfig) { c.AllowMsgTTL = true }},
		{"discard", func(c *jetstream.StreamConfig) { c.Discard = jetstream.DiscardOld }},
		{"max_age", func(c *jetstream.StreamConfig) { c.MaxAge, c.Duplicates = time.Second, time.Second }},
		{"persist_mode", func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode }},
	} {
		config := jetstream.StreamConfig{Name: "GENERATION", Subjects: []string{"generation.requested.>"},
			Discard: jetstream.DiscardNew}
		c.change(&config)
		if _, err := js.CreateStream(t.Context(), config); err != nil {
			t.Fatalf("%s: %v", c.setting, err)
		}
		if _, err := EnsureStream(t.Context(), js, StreamConfig{}); !errors.Is(err, ErrStreamConfig) ||
			!strings.Contains(err.Error(), c.setting) {
			t.Errorf("error is %v, want one that names %s", err, c.setting)
		}
		if err := js.DeleteStream(t.Context(), "GENERATION"); err != nil {
			t.Fatal(err)
		}
	}
}
