// Package terminal prints for people: progress bars, colours, and text from outside that a terminal must not act on.
package terminal

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// Is reports whether f is a file that is a terminal.
func Is(f any) bool {
	file, ok := f.(*os.File)
	return ok && term.IsTerminal(int(file.Fd())) //nolint:gosec // a file descriptor is small
}

// Printable returns s with a question mark in place of each character that cannot be printed.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// Time returns a time as people read it: with its date and zone, in UTC.
func Time(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// Dim returns text that a terminal prints faintly.
func Dim(text string) string { return "\x1b[2m" + text + "\x1b[0m" }

// Progress returns a progress bar of total steps on w. It draws nothing if w is nil or there are fewer than two steps.
func Progress(w io.Writer, total int, what string) *progressbar.ProgressBar {
	if w == nil || total < 2 {
		return progressbar.DefaultSilent(int64(total), what)
	}
	return progressbar.NewOptions(total,
		progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(fmt.Sprintf("%-12s", what)),
		progressbar.OptionSetWidth(40), progressbar.OptionShowCount(), progressbar.OptionShowIts(),
		progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(65*time.Millisecond),
		progressbar.OptionSetTheme(progressbar.Theme{Saucer: "█", SaucerPadding: "·", BarStart: "▕", BarEnd: "▏"}),
		progressbar.OptionOnCompletion(func() { fmt.Fprintln(w) }),
	)
}
