package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// Bash completes verbs, verbs of verbs, and flags.
func TestCompletion(t *testing.T) {
	dir := t.TempDir()
	script, stderr, code := verb(t, "completion", "bash")
	if code != exitOK {
		t.Fatal(stderr)
	}
	for typed, want := range map[string]string{
		"thres": "thresholds", "thresholds cal": "calibrate", "review list --sea": "--search", "watch --nats.u": "--nats.url",
	} {
		words := strings.Fields(typed)
		offered, _, code := verb(t, append([]string{"completion", "words"}, words[:len(words)-1]...)...)
		if code != exitOK || !slices.Contains(strings.Fields(offered), want) {
			t.Errorf("%s: %d, %q is not offered", typed, code, want)
		}
		// A program in its place answers bash with what ours offers.
		stub := "#!/bin/sh\ncat <<'END'\n" + offered + "END\n"
		if err := os.WriteFile(filepath.Join(dir, "decuwatch"), []byte(stub), 0o755); err != nil {
			t.Fatal(err)
		}
		shell := exec.CommandContext(t.Context(), "bash", "-c", script+"\nCOMP_WORDS=(decuwatch "+typed+
			")\nCOMP_CWORD=$((${#COMP_WORDS[@]}-1))\n_decuwatch\necho \"${COMPREPLY[@]}\"")
		shell.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
		got, err := shell.CombinedOutput()
		if err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("bash completes %q as %q, %v; want %q", typed, got, err, want)
		}
	}
	for _, shell := range []string{"zsh", "fish"} {
		if out, _, code := verb(t, "completion", shell); code != exitOK || !strings.Contains(out, "completion words") {
			t.Errorf("%s: %d %s", shell, code, out)
		}
	}
	if _, _, code := verb(t, "completion", "csh"); code != exitUsage {
		t.Errorf("csh: %d", code)
	}
}

// A verdict that does not exist is a wrong argument.
func TestResolveRefusesUnknownVerdicts(t *testing.T) {
	_, stderr, code := verb(t, "review", "resolve", "3f2a9c", "bogus", "--postgres.url=postgres://127.0.0.1:1/x")
	if code != exitUsage || !strings.Contains(stderr, "bogus") || !strings.Contains(stderr, "false_alarm") {
		t.Errorf("%d %s", code, stderr)
	}
}
