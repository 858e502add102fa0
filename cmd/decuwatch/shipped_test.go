package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// operatingCommands returns the commands of docs/operating.md that connect as one of the shipped NATS users, by verb.
func operatingCommands(t *testing.T, secrets string) map[string][]string {
	t.Helper()
	page, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	commands := map[string][]string{}
	text := strings.ReplaceAll(string(page), "\\\n", " ")
	for _, line := range regexp.MustCompile(`(?m)^decuwatch .*--nats\.nkey .*$`).FindAllString(text, -1) {
		here := strings.NewReplacer("deploy/.secrets", secrets, "ensembles/", "../../ensembles/")
		words := strings.Fields(here.Replace(line))
		commands[words[1]] = words[1:]
	}
	return commands
}

// A fresh installation with the shipped configuration of NATS works with the commands of docs/operating.md, and logs no
// warning but that there are no thresholds. Wrong keys and a wrong inbox prefix are in the log with their cause.
func TestShippedUsers(t *testing.T) {
	secrets := natstest.Secrets(t, "../../deploy/secrets")
	opts := natstest.Shipped(t, "../../deploy/nats/nats-server.conf", secrets)
	opts.HTTPPort = server.RANDOM_PORT
	nats := natstest.Run(t, opts)
	commands := operatingCommands(t, secrets)
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.ClientURL(), "DECUWATCH_POSTGRES_URL=" + pgtest.URL(t)}}
	serving := append(commands["serve"], "--metrics.address=127.0.0.1:0", "--review.address=none", "--scoring.threads=1")

	serve := start(t, user.env, serving...)
	isReady(t, metricsAddress(t, serve))
	user.run(exitOK, commands["publish"]...)
	out, _ := user.run(exitOK, append(commands["watch"], "--all", "--no-follow")...)
	if out != "" {
		t.Errorf("alerts: %s", out)
	}
	natstest.Until(t, "both sides agree", func() bool {
		out, _ := user.run(exitOK, commands["reconcile"]...)
		return strings.Contains(out, "Both sides agree.") && regexp.MustCompile(`\b1\s+scores`).MatchString(out)
	})
	log, err := os.ReadFile(serve.log)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if regexp.MustCompile(`level=(WARN|ERROR)`).MatchString(line) && !strings.Contains(line, "no threshold applies") {
			t.Errorf("a fresh installation logs %s", line)
		}
	}
	serve.stop()

	prefix := func(args []string, value string) []string {
		return append(args[:len(args):len(args)], "--nats.inbox-prefix="+value)
	}
	says := func(w *worker, words ...string) {
		t.Helper()
		for _, word := range words {
			natstest.Until(t, "the log says "+word, func() bool { return strings.Contains(w.tail(), word) })
		}
		w.signal(9)
		w.wait()
	}
	says(start(t, user.env, prefix(serving, "_INBOX")...), "ermissions Violation", "set nats.inbox-prefix")
	says(start(t, user.env, append(serving, "--nats.nkey="+filepath.Join(secrets, "wrong.nk"))...), "no such file")
	stranger := natstest.Secrets(t, "../../deploy/secrets")
	says(start(t, user.env, append(serving, "--nats.nkey="+filepath.Join(stranger, "nats-worker.nk"))...),
		"cannot connect to NATS", "Authorization Violation")
	_, errs := user.run(exitFailed, prefix(commands["publish"], "_INBOX_nobody")...)
	holds(t, errs, "set nats.inbox-prefix")
}
