package review_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

const tiny2 = "../scoring/testdata/tiny-2"

// The page shows what the judge says, or why it says nothing, and what the class was trained on.
func TestJudgeOnThePage(t *testing.T) {
	b := newBench(t, tiny2)
	e := b.engine.Ensemble()
	var data []postgres.ClassData
	for i, c := range e.Classes {
		data = append(data, postgres.ClassData{Model: e.Name, EnsembleDigest: e.Digest, ClassIndex: i, ClassLabel: c.Label,
			JudgeAccuracy: e.Judge.Accuracy[i]})
		if c.Data != nil {
			data[i].Images, data[i].NEff, data[i].LikelyMislabeled = &c.Data.Images, &c.Data.NEff, &c.Data.LikelyMislabeled
		}
	}
	if err := b.store.AddClassData(t.Context(), data); err != nil {
		t.Fatal(err)
	}
	worker, err := review.NewWorker(b.store, []review.Gatherer{b.engine}, review.WorkerConfig{Poll: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	running(t, worker.Run)
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	for class, want := range [][]string{
		{"Higher", "asked", "class-0 <strong>", "n_eff 1 of 1 images; 0 look mislabeled", "/evidence/producer",
			"after step 3 of 4"},
		{"not measured: the judge cannot tell this class (its accuracy is unknown)", "n_eff 3.16 of 10 images"},
		{"not measured: the judge cannot tell this class (accuracy 0.50)", "n_eff 10 of 100 images; 5 look mislabeled"},
		{"class-3 <strong>"},
	} {
		b.record(request{class: class, seed: 2})
		score, id := b.record(request{class: class, seed: 1, alert: schema.SeverityWarn})
		until(t, "evidence", func() bool { return b.evidence(id) == postgres.EvidenceDone })
		_, _, page := ask(t, "GET", site.URL+"/review/"+id, nil, nil)
		page = strings.Join(strings.Fields(page), " ")
		for _, text := range append(want, "the rerun gave the stored score") {
			if !strings.Contains(page, text) {
				t.Errorf("the page of class %d does not say %q:\n%s", class, text, page)
			}
		}
		if measured := score.ImageRisk != nil; measured != strings.Contains(page, "image risk <strong") ||
			measured == strings.Contains(page, "not measured") {
			t.Errorf("class %d: measured %t, the page says\n%s", class, measured, page)
		}
		if n := strings.Count(page, "look mislabeled"); n != map[bool]int{true: 1}[e.Classes[class].Data != nil] {
			t.Errorf("class %d: %d sentences on the training data", class, n)
		}
		details, err := review.Load(t.Context(), b.store, id)
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		if err := details.Print(&out); err != nil {
			t.Fatal(err)
		}
		if score.ImageRisk != nil {
			top := score.ImageRisk.Top[0]
			want = []string{fmt.Sprintf("%.3f %s", top.Probability, e.Classes[top.Class].Label)}
		}
		if !strings.Contains(out.String(), want[0]) {
			t.Errorf("review show of class %d does not say %q:\n%s", class, want[0], out.String())
		}
	}
}

// An ensemble without a judge, and a score from before there were any.
func TestNoJudgeOnThePage(t *testing.T) {
	b := newBench(t, tiny)
	score, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	site := servePage(t, b.store, review.PageConfig{Access: review.Access{Reviewer: "ada"}})
	_, _, page := ask(t, "GET", site.URL+"/review/"+id, nil, nil)
	if score.ImageRiskReason != schema.NoJudge || !strings.Contains(page, "not measured: the ensemble has no judge") {
		t.Errorf("the page of a score without a judge (%q):\n%s", score.ImageRiskReason, page)
	}
	score.Event.ID, score.ImageRiskReason = "spoiled", schema.NotFinite
	b.n++
	id = b.commit(score, request{alert: schema.SeverityWarn})
	if _, _, page = ask(t, "GET", site.URL+"/review/"+id, nil, nil); !strings.Contains(page, "is not finite") {
		t.Errorf("the page does not say that the judge's output was not finite:\n%s", page)
	}
	score.Event.ID, score.ImageRiskReason = "old", ""
	b.n++
	id = b.commit(score, request{alert: schema.SeverityWarn})
	_, _, page = ask(t, "GET", site.URL+"/review/"+id, nil, nil)
	if strings.Contains(page, "not measured") || strings.Contains(page, "image risk") {
		t.Errorf("the page of an old score speaks of its image risk:\n%s", page)
	}
}
