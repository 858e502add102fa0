package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// latentFlags name a latent of the producer, which is published with the event.
type latentFlags struct {
	Latent   string   `placeholder:"FILE" help:"Latent of the producer: a .safetensors file, or raw numbers."`
	Dtype    string   `placeholder:"TYPE" help:"Number type of a raw latent: float32, float16 or bfloat16."`
	Shape    []int    `placeholder:"C,H,W" help:"Channels, height and width of a raw latent."`
	Step     int      `placeholder:"N" help:"Steps that the producer's sampler had taken to the latent."`
	Timestep *float64 `placeholder:"T" help:"Timestep of the sampler at that step."`

	object []byte
}

// read reads the latent's file and notes in the event what it says.
func (f *latentFlags) read(e *schema.Event) (err error) {
	if f.Latent == "" {
		if f.Dtype != "" || f.Shape != nil || f.Step != 0 || f.Timestep != nil {
			return usage("--dtype, --shape, --step and --timestep describe a latent: give --latent FILE")
		}
		return nil
	}
	if f.object, err = os.ReadFile(f.Latent); err != nil {
		return usage("--latent: %w", err)
	}
	l := schema.Latent{Format: schema.FormatRaw, Dtype: f.Dtype, Shape: f.Shape}
	if strings.HasSuffix(f.Latent, ".safetensors") {
		if f.Dtype != "" || f.Shape != nil {
			return usage("--dtype and --shape describe a raw latent; %s says them itself", f.Latent)
		}
		if l, err = schema.DescribeLatent(f.object); err != nil {
			return usage("%s: %w", f.Latent, err)
		}
	}
	l.Step, l.Timestep = f.Step, f.Timestep
	placed, err := l.Place(e.Data.Model, f.object)
	if err != nil {
		return usage("%s: %w", f.Latent, err)
	}
	e.Data.Latent = &placed
	return nil
}

// publish stores the latent before the event that names it.
func (f *latentFlags) publish(ctx context.Context, js jetstream.JetStream, e *schema.Event) error {
	if f.Latent == "" {
		return nil
	}
	if _, err := schema.PublishLatent(ctx, js, e.Data.Model, *e.Data.Latent, f.object); err != nil {
		return fmt.Errorf("%w (a monitor makes the bucket if latents.max-bytes is set)", err)
	}
	return nil
}
