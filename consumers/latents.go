package consumers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

// LatentConfig is the buckets of latents that events name. A bucket that exists stays as its operator made it.
type LatentConfig struct {
	// How long an event waits for its latent, counted from the time when the stream stored the event. Then the event is
	// skipped.
	Wait time.Duration `name:"wait" default:"10s" min:"0s" max:"5m"`
	// Maximum size of a new bucket in bytes, one for each model; 0 makes no buckets.
	MaxBytes int64 `name:"max-bytes" default:"0" min:"0"`
	// How long a new bucket keeps a latent. Replays and evidence need it as long as they are wanted.
	MaxAge time.Duration `name:"max-age" default:"168h" min:"1m"`
}

// Check returns an error that names the settings out of their bounds.
func (c LatentConfig) Check() error { return settings.Check("latents", c) }

// Latents reads the latents that events name.
type Latents struct {
	js   jetstream.JetStream
	wait time.Duration
}

// NewLatents returns a reader of latents.
func NewLatents(js jetstream.JetStream, c LatentConfig) *Latents { return &Latents{js, c.Wait} }

// EnsureLatents creates the buckets of the models that do not have one yet, if the configuration gives buckets a size.
func EnsureLatents(ctx context.Context, js jetstream.JetStream, c LatentConfig, replicas int, models ...string) error {
	if c.MaxBytes == 0 {
		return nil
	}
	for _, model := range models {
		bucket := schema.LatentBucket(model)
		_, err := js.ObjectStore(ctx, bucket)
		if errors.Is(err, jetstream.ErrBucketNotFound) {
			_, err = js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{
				Bucket: bucket, Description: "Latents of generation events for decuwatch", TTL: c.MaxAge,
				MaxBytes: c.MaxBytes, Storage: jetstream.FileStorage, Replicas: replicas,
			})
			if errors.Is(err, jetstream.ErrBucketExists) { // another worker was first
				err = nil
			}
		}
		if err != nil {
			return fmt.Errorf("ensure bucket %s: %w", bucket, err)
		}
	}
	return nil
}

// fetchTimeout bounds one attempt to read a latent.
const fetchTimeout = 10 * time.Second

// Latent returns the object of a latent that an event names, which the stream stored at the given time. If the object
// is not there, it may still arrive: it is looked for until the wait is over. The error then wraps
// schema.ErrLatentMissing. It is a *schema.LatentError if the object cannot be used.
func (l *Latents) Latent(ctx context.Context, ref schema.Latent, stored time.Time) ([]byte, error) {
	now := time.Now()
	last := min(l.wait, stored.Add(l.wait).Sub(now)) // the clocks may differ
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		object, err := l.read(ctx, ref)
		if !errors.Is(err, schema.ErrLatentMissing) || time.Since(now)+pause > last {
			return object, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
	}
}

// read reads the object once. An object store that is away says nothing about the event.
func (l *Latents) read(ctx context.Context, ref schema.Latent) ([]byte, error) {
	once, cancel := context.WithTimeoutCause(ctx, fetchTimeout, fmt.Errorf("read latent timed out after %s", fetchTimeout))
	defer cancel()
	object, err := schema.ReadObject(once, l.js, ref)
	if err != nil && once.Err() != nil {
		err = context.Cause(once)
	}
	if err != nil && !l.js.Conn().IsConnected() {
		return nil, Unavailable(err)
	}
	return object, err
}
