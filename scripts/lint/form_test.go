package main

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	root      = "../.."
	columns   = 120
	functions = 60 // lines
)

// wide matches files that may have longer lines: they are frozen, made by a program, or somebody else's.
var wide = regexp.MustCompile(`^(` + strings.Join([]string{
	`.*\.json`, // a string cannot be broken
	`.*/testdata/.*`,
	`schema/postgres/migrations/00\d+_.*\.sql`, // frozen; see TestMigrationsAreFrozen
	`internal/app/help\.txt`,
	`review/static/htmx\.min\.js`,
	`LICENSE`,
	`(.*/)?go\.(mod|sum)`,
	`.*\.lock`,
}, "|") + `)$`)

// pinned matches an image with its digest, which cannot be broken.
var pinned = regexp.MustCompile(`@sha256:[0-9a-f]{64}$`)

// TestLines finds lines of more than 120 columns in the repository's files.
func TestLines(t *testing.T) {
	n := 0
	for _, path := range tracked(t) {
		content, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		if wide.MatchString(path) || bytes.IndexByte(content, 0) >= 0 {
			continue
		}
		n++
		number := 0
		for line := range strings.Lines(string(content)) {
			number++
			line = strings.TrimRight(line, "\n")
			if width := utf8.RuneCountInString(line); width > columns && !pinned.MatchString(line) {
				t.Errorf("%s:%d: %d columns", path, number, width)
			}
		}
	}
	if n < 300 {
		t.Errorf("only %d files", n)
	}
}

// TestFunctions finds functions of more than 60 lines outside tests. Only Serve may be longer: it wires the program.
func TestFunctions(t *testing.T) {
	n := 0
	for _, path := range tracked(t) {
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			continue
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, filepath.Join(root, path), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			n++
			lines := files.Position(f.End()).Line - files.Position(f.Pos()).Line + 1
			if lines > functions && (path != "internal/app/serve.go" || f.Name.Name != "Serve") {
				t.Errorf("%s: %s has %d lines", path, f.Name.Name, lines)
			}
		}
	}
	if n < 500 {
		t.Errorf("only %d functions", n)
	}
}

// tracked returns the files of the repository.
func tracked(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command("git", "-C", root, "ls-files", "-z").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimRight(string(out), "\x00"), "\x00")
}
