package ensemble

import (
	"encoding/json"
	"strings"
	"testing"
)

// A judge apart from an ensemble fits its images and classes, or is refused by name.
func TestReadJudge(t *testing.T) {
	e, err := Open("../testdata/tiny-2")
	if err != nil {
		t.Fatal(err)
	}
	graph, err := e.ReadFile(*e.Files.Judge)
	if err != nil {
		t.Fatal(err)
	}
	document, err := json.Marshal(e.Judge)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadJudge(document, graph, &e.Manifest); err != nil {
		t.Errorf("the ensemble's own judge: %v", err)
	}
	for _, c := range []struct{ old, by, want string }{
		{`"resize"`, `"size"`, "field size is unknown"},
		{`"channels":1`, `"channels":3`, "channels is 3, must be 1"},
		{`"outputs":[0,`, `"outputs":[9,`, "outputs[0] is 9"},
		{`"height":12`, `"height":13`, `input "image" has shape`},
	} {
		changed := strings.Replace(string(document), c.old, c.by, 1)
		if _, err := ReadJudge([]byte(changed), graph, &e.Manifest); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want %q", c.by, err, c.want)
		}
	}
	if _, err := ReadJudge(document, []byte("no graph"), &e.Manifest); err == nil {
		t.Error("a file that is no graph is taken")
	}
}
