// Command decuwatch watches a production image generator for requests that its model does not understand.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/decuwatch/decuwatch/internal/app"
)

func main() {
	time.Local = time.UTC // the one zone of logs, lists and JSON
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	for _, name := range app.UnknownVariables(os.Environ()) {
		fmt.Fprintf(os.Stderr, "decuwatch: the environment variable %s is not a setting and is ignored\n", name)
	}
	for _, name := range app.EmptyVariables(os.Environ()) {
		fmt.Fprintf(os.Stderr, "decuwatch: the environment variable %s is empty and is ignored\n", name)
	}
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
}
