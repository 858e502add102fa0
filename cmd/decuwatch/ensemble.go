package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"text/tabwriter"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type ensembleCmd struct {
	Inspect ensembleInspectCmd `cmd:"" help:"Print what an ensemble holds."`
	Verify  ensembleVerifyCmd  `cmd:"" help:"Check an ensemble as serve does when it starts."`
}

type ensembleInspectCmd struct {
	Path string `arg:"" help:"Ensemble: a directory, or a manifest."`
	JSON bool   `name:"json" help:"Print the manifest and its digest as JSON."`
}

func (ensembleInspectCmd) Help() string {
	return `Examples:

  decuwatch ensemble inspect ensembles/fashion-mnist
  decuwatch ensemble inspect --json ensembles/fashion-mnist/rotation-1.json | jq .manifest.profile`
}

func (c *ensembleInspectCmd) Run(s *streams) error {
	e, err := ensemble.Open(c.Path)
	if err != nil {
		return err
	}
	if c.JSON {
		return writeJSON(s.out, map[string]any{"digest": e.Digest, "manifest": json.RawMessage(e.Document)})
	}
	meaning := map[string]string{
		ensemble.RegimeExposure: "the class was hardly trained", ensemble.RegimeDisagreement: "the data leave the class open",
	}[e.Regime]
	about := "class gap"
	if e.Profile.ClassGap.Tables != ensemble.TablesMembers {
		about = "disagreement of the members"
	}
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "name\t%s\ndigest\t%s\n", e.Name, e.Digest)
	fmt.Fprintf(w, "components\t%d tables of %d classes, %d x %d\n", e.Components, len(e.Classes), e.Context.Tokens,
		e.Context.Dim)
	if e.Posterior > 0 {
		fmt.Fprintf(w, "posterior\t%d tables around the producer's\n", e.Posterior)
	}
	if e.Judge != nil {
		fmt.Fprintf(w, "judge\t%s, %.1f MB: %s\n", e.Files.Judge.Path, float64(e.Files.Judge.Size)/1e6, e.Judge.Measured)
	}
	fmt.Fprintf(w, "latent\t%d x %d x %d\n", e.Latent.Channels, e.Latent.Height, e.Latent.Width)
	fmt.Fprintf(w, "image\t%d x %d x %d\n", e.Image.Channels, e.Image.Height, e.Image.Width)
	fmt.Fprintf(w, "backbone\t%s, %.1f MB, %s, opset %d\n", e.Files.UNet.Path, float64(e.Files.UNet.Size)/1e6,
		e.Precision, e.Opset)
	fmt.Fprintf(w, "diffusion\t%s of %d timesteps, %s, %s spacing\n", e.Diffusion.BetaSchedule,
		e.Diffusion.TrainTimesteps, e.Diffusion.Prediction, e.Diffusion.TimestepSpacing)
	fmt.Fprintf(w, "noise\t%s\nregime\t%s: a high %s says: %s\nsettings\t%s\n", e.Noise, e.Regime, about, meaning,
		e.Profile.Settings())
	if e.Profile.Reason != "" {
		fmt.Fprintf(w, "reason\t%s\n", e.Profile.Reason)
	}
	for _, name := range schema.MeasurementNames() {
		if r, ok := e.Reference[string(name)]; ok {
			fmt.Fprintf(w, "reference %s\tmean %.4g, 99%% quantile %.4g, of %d scores of well-sampled classes\n", name, r.Mean,
				r.Quantiles["0.99"], r.N)
		}
	}
	printClasses(w, e)
	return w.Flush()
}

// printClasses prints the classes, and what ensembles of format 2 know of each: "-" if they do not know it.
func printClasses(w io.Writer, e *ensemble.Ensemble) {
	if e.Format == ensemble.Format1 {
		fmt.Fprintf(w, "\nclass\tlabel\ttraining images\n")
		for i, class := range e.Classes {
			fmt.Fprintf(w, "%d\t%s\t%s\n", i, class.Label, class.ImageCount())
		}
		return
	}
	number := func(v *float64) string {
		if v == nil {
			return "-"
		}
		return fmt.Sprintf("%.4g", *v)
	}
	fmt.Fprintf(w, "\nclass\tlabel\ttraining images\tn_eff\tdraws\texpected gap\tjudge's accuracy\n")
	for i, class := range e.Classes {
		var nEff, accuracy *float64
		if class.Data != nil {
			nEff = &class.Data.NEff
		}
		if e.Judge != nil {
			accuracy = e.Judge.Accuracy[i]
		}
		told := number(accuracy)
		if e.Judge != nil && !e.Judge.CanTell(i) {
			told += " (cannot tell)"
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%d\t%s\t%s\n", i, class.Label, class.ImageCount(), number(nEff), class.Draws,
			number(class.ClassGap), told)
	}
}

type ensembleVerifyCmd struct {
	Path    string        `arg:"" help:"Ensemble: a directory, or a manifest."`
	Scoring runtimeConfig `embed:"" prefix:"scoring." group:"Scoring"`
}

// runtimeConfig are the settings of app.ScoringConfig that say how a graph is run.
type runtimeConfig struct {
	Library string `name:"library" placeholder:"FILE" help:"ONNX Runtime's library. Defaults to the one that serve finds."`
	Device  string `name:"device" default:"cpu" help:"cpu, cuda:N or tensorrt:N. Defaults to cpu."`
	Threads int    `name:"threads" default:"0" help:"Threads of a session; 0 shares the CPUs among sessions."`
}

func (c runtimeConfig) options() scoring.Options {
	return scoring.Options{Library: c.Library, Device: c.Device, Threads: c.Threads, Log: slog.New(slog.DiscardHandler)}
}

func (ensembleVerifyCmd) Help() string {
	return `Checks bounds, digests, graphs and tables, and runs the graphs once. Exit code 1 if serve would refuse the ` +
		`ensemble, with the reason.

Example:

  decuwatch ensemble verify ensembles/fashion-mnist`
}

func (c *ensembleVerifyCmd) Run(s *streams, log *slog.Logger) error {
	engine, err := scoring.Open(c.Path, c.Scoring.options())
	if err != nil {
		return err
	}
	defer func() {
		if err := engine.Close(); err != nil {
			log.Warn("ensemble was not closed", "err", err)
		}
	}()
	e := engine.Ensemble()
	_, err = fmt.Fprintf(s.out, "%s %s is sound: %d components, %d classes, %s\n", e.Name, e.Digest, e.Components,
		len(e.Classes), engine.Profile().Settings())
	return err
}
