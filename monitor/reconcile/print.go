package reconcile

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// Print prints the counts, the differences, and whether both sides agree.
func (r *Report) Print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	for _, line := range []struct {
		n    int
		what string
	}{
		{r.Messages, "messages"}, {r.Scores, "scores"}, {r.Skips, "skips"}, {r.DeadLetters, "dead letters"},
		{r.Repeats, "repeats of an event, whose first verdict stands"}, {r.Waiting, "waiting for a verdict"},
		{r.Orphaned, "ORPHANED: nobody takes them"}, {r.Missing, "acknowledged WITHOUT a verdict"},
		{r.Several, "with SEVERAL verdicts"}, {r.Lost, "LOST: gone from the stream without a verdict"},
	} {
		fmt.Fprintf(w, "%d\t %s\t\n", line.n, line.what)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d alerts, %d published, %d held back, %d owed, %d lost, %d unknown\n",
		r.Alerts, r.Published, r.HeldBack, r.OwedAlerts, r.LostAlerts, r.UnknownAlerts)
	for _, d := range r.Differences {
		fmt.Fprintf(out, "  %s\n", d)
	}
	verdict := "Both sides agree."
	if !r.Agrees() {
		verdict = "The two sides do NOT agree."
	}
	_, err := fmt.Fprintln(out, verdict)
	return err
}
