// Command lint runs the analyzers that find real faults and that go vet and staticcheck do not have. It is a tool for
// go vet: see make lint. A diagnostic is accepted with a comment on its line, //nolint:NAME // the reason.
package main

import (
	"strings"

	"github.com/gostaticanalysis/nilerr"
	"github.com/nishanths/exhaustive/passes/exhaustive"
	"github.com/polyfloyd/go-errorlint/errorlint"
	"github.com/ryanrolds/sqlclosecheck/pkg/analyzer"
	"github.com/timakin/bodyclose/passes/bodyclose"
	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/analysis/unitchecker"

	"github.com/decuwatch/decuwatch/scripts/lint/joined"
)

func main() {
	// Only our own enumerations; a default case covers what a switch does not name.
	for name, value := range map[string]string{"d": "true", "typeonly": `^github\.com/decuwatch/`} {
		if err := exhaustive.Analyzer.Flags.Set(name, value); err != nil {
			panic(err)
		}
	}
	analyzers := []*analysis.Analyzer{
		joined.Analyzer, errorlint.NewAnalyzer(), nilerr.Analyzer, analyzer.NewAnalyzer(), bodyclose.Analyzer, exhaustive.Analyzer,
	}
	for _, a := range analyzers {
		a.Run = accepting(a)
	}
	unitchecker.Main(analyzers...)
}

// accepting returns a's Run without the diagnostics in tests and on lines that say //nolint:NAME.
func accepting(a *analysis.Analyzer) func(*analysis.Pass) (any, error) {
	run := a.Run
	return func(pass *analysis.Pass) (any, error) {
		accepted := map[string]map[int]bool{} // lines of files
		for _, file := range pass.Files {
			for _, group := range file.Comments {
				for _, comment := range group.List {
					if at := pass.Fset.Position(comment.Pos()); strings.HasPrefix(comment.Text, "//nolint:"+a.Name) {
						if accepted[at.Filename] == nil {
							accepted[at.Filename] = map[int]bool{}
						}
						accepted[at.Filename][at.Line] = true
					}
				}
			}
		}
		report := pass.Report
		pass.Report = func(d analysis.Diagnostic) {
			if at := pass.Fset.Position(d.Pos); !strings.HasSuffix(at.Filename, "_test.go") && !accepted[at.Filename][at.Line] {
				report(d)
			}
		}
		return run(pass)
	}
}
