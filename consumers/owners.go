package consumers

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// View is what the server says about the stream of events and its consumers at one moment.
type View struct {
	Time      time.Time // when the consumers were listed, by the server's clock
	Created   time.Time // when the stream was made: a stream that is made anew counts from 1 again
	Config    jetstream.StreamConfig
	State     jetstream.StreamState // from before the consumers were listed, with the number of messages of each subject
	Consumers map[string]jetstream.ConsumerInfo
	Missing   []string // consumers of which the server knows no more than the name at this moment
}

// ReadView asks the server for the stream, then for its consumers. An answer that is not complete is an error; the
// consumers that the server itself could not ask are in Missing.
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
	v := &View{Time: info.TimeStamp, Created: info.Created, Config: info.Config, State: info.State, Consumers: map[string]jetstream.ConsumerInfo{}}
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
	Orphaned Ownership = "orphaned" // the consumer stands, and nobody pulls the subject's events from it
	Unowned  Ownership = "unowned"  // the model has no consumer
	Unknown  Ownership = "unknown"  // the server could not say
)

// Owner says who takes the events of a subject, and since when, by the server's clock, nobody does. A consumer counts as
// pulled from while a request for messages waits at the server, and for the time quiet after the last sign of it: a worker
// whose hands are full asks for nothing.
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

// takes reports whether a consumer is one from which a worker would pull the subject's events.
func takes(c jetstream.ConsumerConfig, subject string) bool {
	filters := c.FilterSubjects
	if c.FilterSubject != "" {
		filters = []string{c.FilterSubject}
	}
	return c.Durable != "" && c.DeliverSubject == "" && len(filters) == 1 && filters[0] == subject
}

// lastSign is the last moment at which somebody is known to have used the consumer.
func lastSign(c jetstream.ConsumerInfo) time.Time {
	last := c.Created
	for _, t := range []*time.Time{c.Delivered.Last, c.AckFloor.Last} {
		if t != nil && t.After(last) {
			last = *t
		}
	}
	return last
}

// Floor returns the sequence up to which a consumer has nothing left to do: all its messages until there are acknowledged.
func (v *View) Floor(c jetstream.ConsumerInfo) uint64 {
	if c.NumPending == 0 && c.NumAckPending == 0 {
		return max(v.State.LastSeq, c.AckFloor.Stream)
	}
	return c.AckFloor.Stream
}

// LowestFloor returns the sequence up to which no consumer of the stream has anything left to do. It is 0 if a consumer
// could not be asked.
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

// owners remembers what single views cannot tell.
type owners struct {
	own    map[string]bool      // models of this process
	quiet  time.Duration        // see View.Owner
	pulled map[string]time.Time // by subject: when somebody was last seen to pull, by the server's clock
	absent map[string]time.Time // by subject: since when it has no consumer, by the server's clock
	idle   map[string]time.Time // by subject: since when this process sees that nobody pulls, by the server's clock
}

func newOwners(models []string, quiet time.Duration) *owners {
	o := &owners{
		own: map[string]bool{}, quiet: quiet, pulled: map[string]time.Time{}, absent: map[string]time.Time{}, idle: map[string]time.Time{},
	}
	for _, m := range models {
		o.own[m] = true
	}
	return o
}

// of says who takes the subject's events, and since when nobody does. The models of this process are owned, even before
// their consumers stand.
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
	if c := v.Consumers[Durable(strings.TrimPrefix(subject, subjectPrefix))]; c.Delivered.Last == nil && c.AckFloor.Last == nil {
		since = seen // a server that was restarted, or a new leader, has forgotten when the consumer was used
	}
	return owner{Ownership: ownership, since: since, seen: seen}
}

// at is of by the view and by when somebody was last seen to pull.
func (o *owners) at(v *View, subject string) (Ownership, time.Time) {
	ownership, since := v.Owner(subject, o.quiet)
	if ownership == Unowned {
		// The consumer may have been deleted a moment ago, with events on it that are older.
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

// forget drops what is remembered of subjects that have left the stream.
func (o *owners) forget(v *View) {
	for _, m := range []map[string]time.Time{o.pulled, o.absent, o.idle} {
		for subject := range m {
			if _, ok := v.State.Subjects[subject]; !ok {
				delete(m, subject)
			}
		}
	}
}
