package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"github.com/schollz/progressbar/v3"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
)

// Exit codes.
const (
	exitOK         = 0
	exitFailed     = 1 // the last line of stderr says why
	exitUsage      = 2 // a flag, a setting or an argument is wrong
	exitDifference = 3 // a check found a difference
)

// errDifference is returned by a check (reconcile, replay, redeliver) that found a difference and has printed it.
var errDifference = errors.New("a difference was found")

// usage returns an error in the caller's flags, settings or arguments.
func usage(format string, args ...any) error { return settings.Errorf(format, args...) }

// cli is the command line, with one field for each verb.
type cli struct {
	ConfigFile string `name:"config" short:"c" placeholder:"FILE" help:"YAML file of settings; or set DECUWATCH_CONFIG."`

	Log app.LogConfig `embed:"" prefix:"log." group:"Logging"`

	Serve     serveCmd     `cmd:"" help:"Score events as they come, until SIGTERM."`
	Demo      demoCmd      `cmd:"" help:"Show the monitor end to end, with servers of its own."`
	Publish   publishCmd   `cmd:"" help:"Publish generation events, one from flags or many from a file."`
	Watch     watchCmd     `cmd:"" help:"Follow alerts."`
	Score     scoreCmd     `cmd:"" help:"Score one request locally, without NATS and Postgres."`
	Replay    replayCmd    `cmd:"" help:"Compute a stored score again and compare."`
	Rescore   rescoreCmd   `cmd:"" help:"Score stored events again, behind live work."`
	Compare   compareCmd   `cmd:"" help:"Compare the scores of two ensembles on the same events."`
	Promote   promoteCmd   `cmd:"" help:"Check that a shadow ensemble can take over, and say how."`
	Reconcile reconcileCmd `cmd:"" help:"Compare the streams with Postgres."`

	DeadLetter deadLettersCmd `cmd:"" name:"dead-letters" help:"List, show and republish what could not be scored."`

	Redeliver  redeliverCmd  `cmd:"" hidden:"" help:"The earlier name of dead-letters republish."`
	Republish  republishCmd  `cmd:"" help:"Publish alerts again that their stream has lost."`
	Thresholds thresholdsCmd `cmd:"" help:"List and set thresholds."`
	Silences   silencesCmd   `cmd:"" help:"Stop sending alerts for a time."`
	Review     reviewCmd     `cmd:"" help:"Work through the queue of alerts."`
	Canary     canaryCmd     `cmd:"" help:"Publish under-trained classes, and raise an alert if no alert fires."`
	Ensemble   ensembleCmd   `cmd:"" help:"Inspect or verify an ensemble directory."`
	Eval       evalCmd       `cmd:"" help:"Measure how good an ensemble's scores are, and what they cost."`
	Migrate    migrateCmd    `cmd:"" help:"Create, upgrade or remove the tables."`
	Version    versionCmd    `cmd:"" help:"Print the version."`
	Completion completionCmd `cmd:"" help:"Print a script that completes verbs and flags in a shell."`
}

// streams are what a verb reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
	terminal bool // out is a terminal
	progress bool // err is a terminal
}

// progress returns a progress bar on stderr, which draws nothing if stderr is not a terminal.
func progress(s *streams, total int, what string) *progressbar.ProgressBar {
	if !s.progress {
		return terminal.Progress(nil, total, what)
	}
	return terminal.Progress(s.err, total, what)
}

// printable makes text from outside fit for a terminal.
func printable(s string) string { return terminal.Printable(s) }

const description = `decuwatch watches a production image generator for requests that its model does not understand.

You can set every setting with a dot in its name in a YAML file (--config), in the environment (nats.url is
DECUWATCH_NATS_URL) and on the command line (--nats.url). The command line wins over the environment, and the
environment over the file.

Exit codes: 0 done, 1 failed, 2 wrong flag, setting or argument, 3 a check found a difference.`

// names are values that flags take.
var names = kong.Vars{"measurements": schema.List(schema.MeasurementNames())}

// familiar translates what people try first: help VERB, and --version alone. A flag --version of every verb would hide
// the flag of review's verbs.
func familiar(args []string) []string {
	switch {
	case len(args) > 0 && args[0] == "help":
		return append(slices.Clone(args[1:]), "--help")
	case len(args) == 1 && args[0] == "--version":
		return []string{"version"}
	}
	return args
}

// named reports whether err says that a file or directory that the arguments name does not exist.
func named(args []string, err error) bool {
	var missing *fs.PathError
	if !errors.As(err, &missing) || !errors.Is(missing, fs.ErrNotExist) {
		return false
	}
	return slices.ContainsFunc(args, func(arg string) bool {
		_, value, _ := strings.Cut(arg, "=")
		return missing.Path == arg || missing.Path == value
	})
}

// run runs the verb that the arguments name, and returns its exit code.
func run(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer,
) int {
	var c cli
	helped := false
	sources := &app.Sources{Getenv: getenv}
	parser, err := kong.New(&c,
		kong.Name("decuwatch"), kong.Description(description), kong.UsageOnError(),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, NoExpandSubcommands: true, WrapUpperBound: 110}),
		kong.Writers(stdout, stderr), kong.Exit(func(int) { helped = true }), sources.Option(), app.Documented(),
		kong.Groups{"Logging": "Logging", "NATS": "NATS", "Postgres": "Postgres", "Scoring": "Scoring"}, names,
	)
	if err != nil {
		fmt.Fprintf(stderr, "decuwatch: %v\n", err)
		return exitFailed
	}
	parsed, err := parser.Parse(familiar(args))
	if helped {
		return exitOK
	}
	if err != nil {
		fmt.Fprintf(stderr, "decuwatch: %s\n", sources.Explain(err))
		var wrong *kong.ParseError
		if errors.As(err, &wrong) && wrong.Context != nil {
			verb := cmp.Or(wrong.Context.Selected(), parser.Model.Node)
			fmt.Fprintf(stderr, "Run \"%s --help\" for its flags.\n", verb.FullPath())
		}
		return exitUsage
	}
	log, err := c.Log.Logger(stderr)
	if err == nil {
		err = app.CheckGroups(parsed.Selected().Target)
	}
	if err == nil {
		slog.SetDefault(log) // libraries that log by default
		parsed.BindTo(ctx, (*context.Context)(nil))
		parsed.Bind(log, &streams{
			in: stdin, out: stdout, err: stderr, terminal: terminal.Is(stdout), progress: terminal.Is(stderr),
		})
		err = parsed.Run()
	}
	var wrong settings.Error
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errDifference):
		return exitDifference
	case errors.As(err, &wrong), named(args, err):
		fmt.Fprintf(stderr, "decuwatch: %s\n", sources.Explain(err))
		return exitUsage
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(stderr, "decuwatch: interrupted")
	default:
		fmt.Fprintf(stderr, "decuwatch: %v\n", err)
	}
	return exitFailed
}
