package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// --version and help work as people expect them to.
func TestVersionAndHelp(t *testing.T) {
	for _, args := range [][]string{{"--version"}, {"version"}} {
		if out, stderr, code := verb(t, args...); code != exitOK || !strings.HasPrefix(out, "decuwatch ") ||
			strings.Count(out, "\n") != 1 {
			t.Errorf("%v: %d %q %s", args, code, out, stderr)
		}
	}
	want, _, _ := verb(t, "thresholds", "set", "--help")
	if out, stderr, code := verb(t, "help", "thresholds", "set"); code != exitOK || out != want || len(out) < 500 {
		t.Errorf("help thresholds set: %d %s%s", code, out, stderr)
	}
	if out, _, code := verb(t, "help"); code != exitOK || !strings.Contains(out, "serve") {
		t.Errorf("help: %d %s", code, out)
	}
}

// asProgram returns the environment of a shell that finds decuwatch in its PATH.
func asProgram(t *testing.T) []string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script := "#!/bin/sh\n" + mainEnv + "=1 exec '" + exe + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "decuwatch"), []byte(script), 0o755); err != nil { //nolint:gosec // it runs
		t.Fatal(err)
	}
	return append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "TERM=dumb", "HOME="+dir)
}

// completing is how each shell completes the line $1 to the word that ends with $2, without its user's settings.
var completing = map[string][]string{
	"bash": {"bash", "--norc", "-c", `source <(decuwatch completion bash)
COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _decuwatch; echo "${COMPREPLY[@]}"`, "bash"},
	"fish": {"fish", "-N", "-c", `decuwatch completion fish | source; complete -C $argv[1]`},
	// zsh completes for a terminal only: another zsh plays one.
	"zsh": {"zsh", "-f", "-c", `zmodload zsh/zpty; zpty z zsh -f -i
zpty -w z 'PROMPT=; autoload -Uz compinit; compinit -u -D; source <(decuwatch completion zsh); print rea""dy'
zpty -r z line '*ready*'; zpty -w -n z "$1"$'\t'; zpty -r z line "*$2*"; print -r -- "$line"`, "zsh"},
}

// Each shell itself completes verbs, verbs of verbs, and flags, by its own script and the program.
func TestCompletion(t *testing.T) {
	environment := asProgram(t)
	for shell, command := range completing {
		for typed, rest := range map[string]string{
			"decuwatch thres": "holds", "decuwatch thresholds cal": "ibrate", "decuwatch dead-letters rep": "ublish",
			"decuwatch review list --sea": "rch", "decuwatch watch --nats.u": "rl",
		} {
			cmd := exec.CommandContext(t.Context(), command[0], append(command[1:len(command):len(command)], typed, rest)...)
			cmd.Env, cmd.Dir = environment, t.TempDir() // fish offers files, too
			got, err := cmd.CombinedOutput()
			words := strings.Fields(typed)
			want := words[len(words)-1] + rest
			if shell == "zsh" { // it repeats the line, with a bell where it goes on
				want = rest
			}
			if err != nil || !strings.Contains(string(got), want) || shell != "zsh" && strings.TrimSpace(string(got)) != want {
				t.Errorf("%s completes %q as %q, %v; want %q (scripts/fetch-shells gets the shells)", shell, typed, got, err, want)
			}
		}
	}
	if _, _, code := verb(t, "completion", "csh"); code != exitUsage {
		t.Errorf("csh: %d", code)
	}
	if out, _, _ := verb(t, "completion", "words"); strings.Contains(out, "redeliver") {
		t.Error("a hidden verb is offered")
	}
}

// A verdict that does not exist is a wrong argument.
func TestResolveRefusesUnknownVerdicts(t *testing.T) {
	_, stderr, code := verb(t, "review", "resolve", "3f2a9c", "bogus", "--postgres.url=postgres://127.0.0.1:1/x")
	if code != exitUsage || !strings.Contains(stderr, "bogus") || !strings.Contains(stderr, "false_alarm") {
		t.Errorf("%d %s", code, stderr)
	}
}
