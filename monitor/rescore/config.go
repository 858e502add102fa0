// Package rescore scores stored events again, behind live work: for a shadow ensemble, or because somebody asked for
// it. The work waits in a JetStream work queue that the ordinary workers serve. Scores go beside the verdicts.
package rescore

import (
	"errors"
	"time"

	"github.com/decuwatch/decuwatch/internal/settings"
)

// Config is the configuration of the queue and its workers. Fields with a name are settings.
type Config struct {
	// Name of the JetStream stream in which re-scores and events for shadow ensembles wait.
	Stream string `name:"stream" default:"RESCORE"`
	// Maximum stored events that are scored at a time for each ensemble, behind live work; 0 leaves them to other
	// processes.
	Workers int `name:"workers" default:"4" min:"0" max:"64"`

	Replicas int           `kong:"-" default:"1" min:"1" max:"5"` // of a new stream
	AckWait  time.Duration `kong:"-" default:"1m" min:"1s"`       // after which another worker gets an event
	MaxTries int           `kong:"-" default:"5" min:"1"`         // failed attempts on one event
}

// Check returns an error that names the settings out of their bounds.
func (c Config) Check() error {
	return errors.Join(settings.StreamName("rescore.stream", c.Stream), settings.Check("rescore", c))
}
