package joined_test

import (
	"testing"

	"golang.org/x/tools/go/analysis/analysistest"

	"github.com/decuwatch/decuwatch/scripts/lint/joined"
)

func TestJoined(t *testing.T) {
	analysistest.Run(t, analysistest.TestData(), joined.Analyzer, "a")
}
