package consumers

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// View is the state of the stream of events and its consumers at one moment.
type View struct {
	Time      time.Time // when the consumers were listed, by the server's clock
	Created   time.Time // when the stream was created; a new stream starts at sequence 1
	Config    jetstream.StreamConfig
	State     jetstream.StreamState // read before the consumers, with the messages of each subject
	Consumers map[string]jetstream.ConsumerInfo
	Missing   []string // consumers whose state the server did not know
}

// ReadView reads the stream, then its consumers. An incomplete answer is an error. Consumers whose state the server
// does not know are in Missing.
func ReadView(ctx context.Context, js jetstream.JetStream, name string) (*View, error) {
	var info *jetstream.StreamInfo
	err := withRetry(ctx, func(ctx context.Context) error {
		stream, err := js.Stream(ctx, name)
		if err != nil {
			return err
		}
		info, err = stream.Info(ctx, jetstream.WithSubjectFilter(subjectPrefix+">"))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read stream %s: %w", name, err)
	}
	v := &View{
		Time: info.TimeStamp, Created: info.Created, Config: info.Config, State: info.State,
		Consumers: map[string]jetstream.ConsumerInfo{},
	}
	for offset, total := 0, 1; offset < total; {
		var page struct {
			answer
			Total     int                      `json:"total"`
			Consumers []jetstream.ConsumerInfo `json:"consumers"`
			Missing   []string                 `json:"missing"`
			Offline   map[string]string        `json:"offline"`
		}
		request := fmt.Appendf(nil, `{"offset":%d}`, offset)
		if err := ask(ctx, js, "CONSUMER.LIST."+name, request, &page); err != nil {
			return nil, fmt.Errorf("list consumers of %s: %w", name, err)
		}
		for _, c := range page.Consumers {
			v.Consumers[c.Name] = c
			if c.TimeStamp.After(v.Time) {
				v.Time = c.TimeStamp
			}
		}
		v.Missing = append(v.Missing, page.Missing...)
		for name := range page.Offline {
			v.Missing = append(v.Missing, name)
		}
		got := len(page.Consumers) + len(page.Missing) + len(page.Offline)
		if total = page.Total; got == 0 && offset < total {
			return nil, fmt.Errorf("list consumers of %s: the list ends after %d of %d", name, offset, total)
		}
		offset += got
	}
	return v, nil
}

// Ownership says who takes the events of a model.
type Ownership string

// Kinds of ownership.
const (
	Owned    Ownership = "owned"    // somebody pulls from the model's consumer
	Orphaned Ownership = "orphaned" // the model has a consumer, but nobody pulls from it
	Unowned  Ownership = "unowned"  // the model has no consumer
	Unknown  Ownership = "unknown"  // the server did not know
)

// Owner says who takes the events of a subject, and since when, by the server's clock, nobody does. Somebody pulls from
// a consumer if a request for messages waits at the server, or if the last sign of a worker is less than quiet ago: a
// worker with all its slots in use requests nothing.
func (v *View) Owner(subject string, quiet time.Duration) (Ownership, time.Time) {
	name := Durable(strings.TrimPrefix(subject, subjectPrefix))
	for _, missing := range v.Missing {
		if missing == name {
			return Unknown, time.Time{}
		}
	}
	c, ok := v.Consumers[name]
	if !ok {
		return Unowned, v.Created
	}
	last := lastSign(c)
	if takes(c.Config, subject) && (c.NumWaiting > 0 || c.TimeStamp.Sub(last) < quiet) {
		return Owned, time.Time{}
	}
	return Orphaned, last
}

// takes reports whether workers would pull the subject's events from the consumer.
func takes(c jetstream.ConsumerConfig, subject string) bool {
	filters := c.FilterSubjects
	if c.FilterSubject != "" {
		filters = []string{c.FilterSubject}
	}
	return c.Durable != "" && c.DeliverSubject == "" && len(filters) == 1 && filters[0] == subject
}

// lastSign returns when somebody last used the consumer.
func lastSign(c jetstream.ConsumerInfo) time.Time {
	last := c.Created
	for _, t := range []*time.Time{c.Delivered.Last, c.AckFloor.Last} {
		if t != nil && t.After(last) {
			last = *t
		}
	}
	return last
}

// Floor returns the sequence number up to which all messages of a consumer are acknowledged.
func (v *View) Floor(c jetstream.ConsumerInfo) uint64 {
	if c.NumPending == 0 && c.NumAckPending == 0 {
		return max(v.State.LastSeq, c.AckFloor.Stream)
	}
	return c.AckFloor.Stream
}

// LowestFloor returns the sequence number up to which all messages of all consumers are acknowledged, or 0 if the state
// of a consumer is unknown.
func (v *View) LowestFloor() uint64 {
	if len(v.Missing) > 0 {
		return 0
	}
	floor := uint64(math.MaxUint64)
	for name, c := range v.Consumers {
		if name != durableRetired {
			floor = min(floor, v.Floor(c))
		}
	}
	return min(floor, v.State.LastSeq)
}

// owners combines views: it remembers what a single view does not show.
type owners struct {
	own    map[string]bool      // models of this process
	quiet  time.Duration        // see View.Owner
	pulled map[string]time.Time // by subject: when somebody was last seen to pull, by the server's clock
	absent map[string]time.Time // by subject: since when it has no consumer, by the server's clock
	idle   map[string]time.Time // by subject: since when this process has seen that nobody pulls, by the server's clock
}

func newOwners(models []string, quiet time.Duration) *owners {
	o := &owners{
		own: map[string]bool{}, quiet: quiet, pulled: map[string]time.Time{}, absent: map[string]time.Time{},
		idle: map[string]time.Time{},
	}
	for _, m := range models {
		o.own[m] = true
	}
	return o
}

// of says who takes the subject's events, and since when nobody does. The models of this process are owned, even if
// they have no consumer yet.
func (o *owners) of(v *View, subject string) owner {
	if o.own[strings.TrimPrefix(subject, subjectPrefix)] {
		return owner{Ownership: Owned}
	}
	ownership, since := o.at(v, subject)
	if ownership != Orphaned {
		delete(o.idle, subject)
		return owner{Ownership: ownership, since: since, seen: since}
	}
	if _, ok := o.idle[subject]; !ok {
		o.idle[subject] = v.Time
	}
	seen := o.idle[subject]
	c := v.Consumers[Durable(strings.TrimPrefix(subject, subjectPrefix))]
	if c.Delivered.Last == nil && c.AckFloor.Last == nil {
		since = seen // a restarted server, or a new leader, does not know when the consumer was used
	}
	return owner{Ownership: ownership, since: since, seen: seen}
}

// at is like of, by the view and by when somebody was last seen to pull.
func (o *owners) at(v *View, subject string) (Ownership, time.Time) {
	ownership, since := v.Owner(subject, o.quiet)
	if ownership == Unowned {
		// The consumer may just have been deleted, with older events on it.
		if _, ok := o.absent[subject]; !ok {
			o.absent[subject] = v.Time
		}
		return Unowned, o.absent[subject]
	}
	delete(o.absent, subject)
	if ownership == Owned {
		o.pulled[subject] = v.Time
	}
	if seen := o.pulled[subject]; seen.After(since) {
		since = seen
		if ownership == Orphaned && v.Time.Sub(seen) < o.quiet {
			return Owned, time.Time{}
		}
	}
	return ownership, since
}

// forget removes subjects that have left the stream.
func (o *owners) forget(v *View) {
	for _, m := range []map[string]time.Time{o.pulled, o.absent, o.idle} {
		for subject := range m {
			if _, ok := v.State.Subjects[subject]; !ok {
				delete(m, subject)
			}
		}
	}
}
