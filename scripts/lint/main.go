// Command lint runs the analyzers that find real faults and that go vet and staticcheck do not have. It is a tool for
// go vet: see make lint. A diagnostic is accepted with a comment on its line, //nolint:NAME // the reason. contextcheck
// also accepts it above a function whose work must outlive the caller's context.
package main

import (
	"strings"

	"github.com/gostaticanalysis/nilerr"
	"github.com/jingyugao/rowserrcheck/passes/rowserr"
	"github.com/kisielk/errcheck/errcheck"
	"github.com/kkHAIKE/contextcheck"
	"github.com/nishanths/exhaustive/passes/exhaustive"
	"github.com/polyfloyd/go-errorlint/errorlint"
	"github.com/ryanrolds/sqlclosecheck/pkg/analyzer"
	"github.com/timakin/bodyclose/passes/bodyclose"
	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/analysis/unitchecker"

	"github.com/decuwatch/decuwatch/scripts/lint/joined"
)

// ignored are functions whose error is of no use: output for people, and the end of what was only read.
var ignored = []string{
	"fmt.Fprint", "fmt.Fprintf", "fmt.Fprintln",
	"(io.Closer).Close", "(net.Conn).Close", "(net.Listener).Close", "(*os.Root).Close",
	"(*database/sql.DB).Close", "(*database/sql.Conn).Close", "(*database/sql.Rows).Close",
	"(*github.com/jackc/pgx/v5.Conn).Close",
}

func main() {
	errcheck.DefaultExcludedSymbols = append(errcheck.DefaultExcludedSymbols, ignored...)
	context := contextcheck.NewAnalyzer(contextcheck.Configuration{})
	// Rows of pgx are read by its functions, which check Err, and not by loops.
	rows := rowserr.NewAnalyzer()
	// Only our own functions and enumerations; a default case covers what a switch does not name.
	set(context, "pkgprefix", "github.com/decuwatch/")
	set(exhaustive.Analyzer, "typeonly", `^github\.com/decuwatch/`)
	set(exhaustive.Analyzer, "d", "true")
	analyzers := []*analysis.Analyzer{
		joined.Analyzer, errcheck.Analyzer, errorlint.NewAnalyzer(), nilerr.Analyzer, context, rows, analyzer.NewAnalyzer(),
		bodyclose.Analyzer, exhaustive.Analyzer,
	}
	for _, a := range analyzers {
		a.Run = accepting(a)
	}
	unitchecker.Main(analyzers...)
}

func set(a *analysis.Analyzer, flag, value string) {
	if err := a.Flags.Set(flag, value); err != nil {
		panic(err)
	}
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
			at := pass.Fset.Position(d.Pos)
			if !strings.HasSuffix(at.Filename, "_test.go") && !accepted[at.Filename][at.Line] {
				report(d)
			}
		}
		return run(pass)
	}
}
