package deploy

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// operated are the documents whose commands are all run.
var operated = []string{"operating.md", "kubernetes.md", "scaling.md", "security.md"}

// notRun are the commands that no check runs, with the reason.
var notRun = map[string]string{
	"scripts/env go test ./scoring -run '^$' -bench BenchmarkCascade -benchtime 1x": "is a measurement",
	"make bench-workers": "is a target itself, and takes half an hour",
	"make compose-check": "is the check",
}

var (
	indented   = regexp.MustCompile(`(?m)^    (.+)$`)
	shellBlock = regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```")
	span       = regexp.MustCompile("`([^`]+)`")
	continued  = regexp.MustCompile(`\\\n\s*`)
	// invoked is how a command begins: assignments, then a program with arguments, or a script.
	invoked = regexp.MustCompile(`^(\w+=\S+ )*((docker|decuwatch|go|make|kubectl|helm|nats|nats-server|curl|psql|git|` +
		`export|scripts/env) |deploy/\S+\.sh\b)`)
)

// commandsIn returns the commands of a document: the lines of its blocks of shell, and what its text names.
func commandsIn(t *testing.T, text string) []string {
	t.Helper()
	var found []string
	for _, block := range shellBlock.FindAllStringSubmatch(text, -1) {
		lines := strings.Split(continued.ReplaceAllString(block[2], ""), "\n")
		switch block[1] {
		case "sh", "bash", "shell", "console":
		default:
			if invoked.MatchString(lines[0]) {
				t.Errorf("a block begins with the command %q and is not marked as sh", lines[0])
			}
			continue
		}
		for _, line := range lines {
			line, _, _ = strings.Cut(strings.TrimPrefix(line, "$ "), " # ")
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				found = append(found, line)
			}
		}
	}
	text = shellBlock.ReplaceAllString(text, "")
	for _, m := range indented.FindAllStringSubmatch(text, -1) {
		if invoked.MatchString(m[1]) {
			found = append(found, m[1])
		}
	}
	for _, m := range span.FindAllStringSubmatch(text, -1) {
		if command := strings.Join(strings.Fields(m[1]), " "); invoked.MatchString(command) {
			found = append(found, command)
		}
	}
	return found
}

// documentedRun is a line of a check: documented FILE 'TEXT' ['COMMAND'], or serves FILE 'TEXT'.
var documentedRun = regexp.MustCompile(`\b(?:documented|serves)\s+(?:\\\n\s*)?([a-z]+\.md)\s+(?:\\\n\s*)?'([^']*)'` +
	`(?:\s+(?:\\\n\s*)?(?:'([^']*)'|"([^"]*)"))?`)

// TestEveryCommandRuns holds the commands of the documents against those that the checks run: image-check,
// compose-check, cluster-check and restore-check. A check prints and runs each of these lines by its function
// documented, or by step in TestBackupAndRestore.
func TestEveryCommandRuns(t *testing.T) {
	written := map[string]string{} // command: document
	for _, name := range operated {
		content, err := os.ReadFile(filepath.Join("../docs", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, command := range commandsIn(t, string(content)) {
			written[command] = name
		}
	}
	if len(written) < 30 {
		t.Errorf("%d commands", len(written))
	}
	runs := commandsOfChecks(t)
	for command, name := range written {
		if !runs[command] && notRun[command] == "" {
			t.Errorf("docs/%s: no check runs %q", name, command)
		}
	}
	for command := range runs {
		if written[command] == "" {
			t.Errorf("a check runs %q, which no document names", command)
		}
	}
	for command := range notRun {
		if written[command] == "" || runs[command] {
			t.Errorf("%q must not be in notRun", command)
		}
	}
}

// commandsOfChecks returns the documented commands that the checks run.
func commandsOfChecks(t *testing.T) map[string]bool {
	t.Helper()
	targets, err := os.ReadFile("deploy.mk")
	if err != nil {
		t.Fatal(err)
	}
	runs := map[string]bool{}
	for _, name := range []string{"image-check", "compose-check", "cluster-check"} {
		if !strings.Contains(string(targets), "\n"+name+": ") || !strings.Contains(string(targets), "deploy/check/"+name) {
			t.Errorf("deploy.mk has no target %s", name)
		}
		script, err := os.ReadFile(filepath.Join("check", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range documentedRun.FindAllStringSubmatch(string(script), -1) {
			command := continued.ReplaceAllString(m[2], "")
			runs[command] = true
			if as := m[3] + m[4]; as != "" && !strings.Contains(as, verb(command)) {
				t.Errorf("%s runs %q as %q", name, command, as)
			}
		}
	}
	script, err := os.ReadFile("restore_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`step\("([^"]+)"\)`).FindAllStringSubmatch(string(script), -1) {
		runs[m[1]] = true
	}
	return runs
}

// verb returns what a command does: the word after its program, or the name of a script.
func verb(command string) string {
	words := strings.Fields(command)
	if strings.HasPrefix(words[0], "deploy/") || strings.HasPrefix(words[0], "curl") {
		return filepath.Base(words[0])
	}
	word, _, _ := strings.Cut(words[1], "=")
	return word
}

// TestCommandsAreFound shows that a command is found wherever a document has it.
func TestCommandsAreFound(t *testing.T) {
	got := commandsIn(t, "    make x\n\n    bytes = 2 kB\n\n"+
		"Run `docker compose\nup -d`, not `nats.url` or `decuwatch`.\n```sh\n# comment\na \\\n  b  # why\n"+
		"c >d\n```\n```yaml\ndocker: x\n```\n`deploy/postgres/backup.sh >x`\n")
	if want := "a b|c >d|make x|docker compose up -d|deploy/postgres/backup.sh >x"; strings.Join(got, "|") != want {
		t.Errorf("%q, want %s", got, want)
	}
}
