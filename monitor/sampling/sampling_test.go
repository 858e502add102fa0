package sampling

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/schema"
)

// parse reads rules as a settings file has them.
func parse(t testing.TB, rules string) Config {
	t.Helper()
	c := Config{Salt: "salt", FewImages: 100}
	if err := c.Rules.UnmarshalText([]byte(rules)); err != nil {
		t.Fatalf("%s: %v", rules, err)
	}
	if err := c.Check(); err != nil {
		t.Fatalf("%s: %v", rules, err)
	}
	return c
}

func event(id string, class schema.Class, labels map[string]string) schema.Event {
	return schema.Event{Source: "/s", ID: id, Data: schema.Generation{Model: "m", Class: class, Labels: labels}}
}

// Bad rules are refused, and the error names the entry and what is wrong.
func TestBadRulesAreRefused(t *testing.T) {
	const never = "entry 2 can never apply: "
	for rules, want := range map[string]string{
		`[{share: 1.5}]`:  "sampling.rules: entry 1: share is 1.5, must be 0 to 1",
		`[{share: -0.1}]`: "entry 1: share is -0.1, must be 0 to 1",
		`[{share: .nan}]`: "entry 1: share is NaN, must be 0 to 1",
		`[{share: .inf}]`: "entry 1: share is +Inf, must be 0 to 1",
		`[{class: Bag, share: 1}, {class: Shirt}]`: "entry 2: share is missing",
		`[{share: }]`:                            "entry 1: share is empty",
		`[{share: many}]`:                        "entry 1:",
		`[{share: 1, class: ""}]`:                "entry 1: class is \"\", must be a label, or an index from 0",
		`[{share: 1, class: -1}]`:                "class is \"-1\"",
		`[{share: 1, class: 1.5}]`:               "class is \"1.5\"",
		`[{share: 1, class: [Bag]}]`:             "class is \"\"",
		`[{share: 1, klass: Bag}]`:               "field klass not found",
		`[{share: 1, share: 0.5}]`:               "already defined",
		`[{share: 1, model: "a b"}]`:             "entry 1: model is \"a b\", must be a model's name",
		`{share: 1}`:                             "must be a list of mappings",
		`[0.5]`:                                  "entry 1: must be a mapping",
		`[{share: 1}, {share: 0.5}]`:             never + "entry 1 comes first",
		`[{share: 1}, {class: Bag, share: 0.5}]`: never,
		`[{model: m, share: 1}, {model: m, share: 1, labels: {a: b}}]`: never,

		`[{share: 1, class: 3, labels: {a: b}}, {share: 0, class: 3, labels: {a: b, c: d}, model: m}]`: never,

		`[{class: a, share: 1}, {share: 1, labels: {b: c}}, {class: a, share: 0, labels: {b: c}}]`: "entry 3 can never " +
			"apply: entry 1 comes first",
	} {
		var c Config
		err := c.Rules.UnmarshalText([]byte(rules))
		if err == nil {
			err = c.Check()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", rules, err, want)
		}
	}
	// What an earlier rule matches in part stays.
	for _, rules := range []string{
		``, `[]`, `[{share: 0}]`, `[{model: m, share: 1}, {share: 0.5}]`, `[{class: Bag, share: 1}, {share: 0.5}]`,
		`[{labels: {a: b}, share: 1}, {labels: {a: c}, share: 1}, {labels: {c: d}, share: 0.1}, {share: 0.5}]`,
		`[{model: m, class: Bag, share: 1}, {model: n, class: Bag, share: 1}, {class: Bag, share: 0.5}]`,
	} {
		parse(t, rules)
	}
	// A label and an index that mean one class are only known with the ensemble.
	c := parse(t, `[{class: Bag, share: 1}, {class: 1, share: 0.5}]`)
	if _, _, err := c.For("m", []string{"Shirt", "Bag"}, []int{1, 1}); err == nil ||
		!strings.Contains(err.Error(), "entry 2 can never apply: entry 1 comes first") {
		t.Errorf("one class by label and by index: %v", err)
	}
}

// The first rule that matches decides. Classes with few images, unknown ones and canaries need a rule that names them.
func TestFirstMatchDecides(t *testing.T) {
	c := parse(t, `
- {model: other, share: 0}
- {class: Rare, labels: {tenant: a}, share: 0.9}
- {class: 2, share: 0.2}
- {class: Nowhere, share: 0.3}
- {labels: {tenant: a}, share: 0.4}
- {model: m, share: 0.5}`)
	sampler, unknown, err := c.For("m", []string{"Rare", "Bag", "Shirt"}, []int{100, 101, 5000})
	if err != nil || fmt.Sprint(unknown) != `["Nowhere"]` {
		t.Fatalf("unknown classes %q: %v", unknown, err)
	}
	a, b := map[string]string{"tenant": "a", "more": "x"}, map[string]string{"tenant": "b"}
	for _, x := range []struct {
		named  schema.Class
		class  int
		labels map[string]string
		share  float64
		free   bool
	}{
		{schema.ClassLabel("Rare"), 0, a, 0.9, false}, {schema.ClassIndex(0), 0, a, 0.9, false},
		{schema.ClassLabel("Rare"), 0, b, 1, true}, {schema.ClassLabel("Rare"), 0, nil, 1, true},
		{schema.ClassLabel("Bag"), 1, a, 0.4, false}, {schema.ClassLabel("Bag"), 1, b, 0.5, false},
		{schema.ClassLabel("Shirt"), 2, a, 0.2, false}, {schema.ClassIndex(2), 2, nil, 0.2, false},
		{schema.ClassLabel("Nowhere"), -1, a, 0.3, false}, {schema.ClassLabel("Elsewhere"), -1, a, 1, true},
		{schema.ClassIndex(7), -1, nil, 1, true},
	} {
		if share, free := sampler.Share(event("1", x.named, x.labels), x.class); share != x.share || free != x.free {
			t.Errorf("class %s with %v: share %g, free %t; want %g, %t", x.named, x.labels, share, free, x.share, x.free)
		}
	}
	canary := event("1", schema.ClassLabel("Shirt"), nil)
	canary.Source = schema.CanarySource
	if share, free := sampler.Share(canary, 2); share != 1 || !free {
		t.Errorf("a canary has share %g", share)
	}
	// Without any images known, every class counts as one with few.
	if sampler, _, _ = c.For("m", []string{"Rare", "Bag", "Shirt"}, nil); sampler.few[1] != true {
		t.Error("a class without known images is sampled out")
	}
}

// The lot is fixed: other versions and other programs must draw the same.
func TestUniformIsFixed(t *testing.T) {
	for _, c := range []struct {
		salt, purpose, source, id string
		want                      float64
	}{
		{"decuwatch", "sample", "//studio/render-2", "event-100", 0.12027538158668316}, // as Python computes it
	} {
		if got := Uniform(c.salt, c.purpose, c.source, c.id); got != c.want {
			t.Errorf("%+v is %v", c, got)
		}
	}
	all := map[float64]string{}
	for _, c := range [][4]string{
		{"a", "b", "c", "d"}, {"ab", "", "c", "d"}, {"", "ab", "c", "d"}, {"a", "bc", "", "d"}, {"a", "b", "cd", ""},
		{"a", "b", "", "cd"}, {"a", "b", "c\n", "d"}, {"a", "b", "c", "\nd"}, {"b", "b", "c", "d"}, {"a", "a", "c", "d"},
	} {
		u := Uniform(c[0], c[1], c[2], c[3])
		if before, ok := all[u]; ok || !(u >= 0 && u < 1) {
			t.Errorf("%q is %v, as %s", c, u, before)
		}
		all[u] = fmt.Sprint(c)
	}
}

// An event that is selected with a share is selected with every greater one, and the purposes are independent.
func TestLotsAreNestedAndIndependent(t *testing.T) {
	s := Sampler{salt: "salt"}
	const n = 20000
	both := 0
	for i := range n {
		ev := event(fmt.Sprint(i), schema.ClassIndex(0), nil)
		was := false
		for _, p := range []float64{0, 0.01, 0.1, 0.5, 0.99, 1} {
			is := s.Selects(ev, p)
			if was && !is || p == 0 && is || p == 1 && !is {
				t.Fatalf("event %d with %g: %t after %t", i, p, is, was)
			}
			was = is
		}
		if s.Selects(ev, 0.5) && Uniform("salt", "cascade", ev.Source, ev.ID) < 0.5 {
			both++
		}
	}
	if z := (float64(both) - n/4) / math.Sqrt(n*3.0/16); math.Abs(z) > 4 {
		t.Errorf("%d of %d events are drawn for both purposes: z = %.1f", both, n, z)
	}
}

// Over salts, the weighed sums of what is selected are unbiased for the sums over all events, and their standard error
// is what they say: whatever the shares, which depend on class and label, and on a share in force that follows the
// past.
func TestEstimatesAreUnbiased(t *testing.T) {
	c := parse(t, `[{class: Shirt, share: 0.1}, {labels: {tenant: a}, share: 0.3}, {share: 0.7}]`)
	const events, salts = 300, 4000
	var list []schema.Event
	var classes []int
	var values []float64
	total := 0.0
	for i := range events {
		class := i % 3
		labels := map[string]string{"tenant": string(rune('a' + i%5))}
		list = append(list, event(fmt.Sprint(i), schema.ClassIndex(class), labels))
		classes = append(classes, class)
		values = append(values, 1+math.Sin(float64(i))+3*float64(class)*float64(i%5)) // depends on what decides the share
		total += values[i]
	}
	sampler, _, err := c.For("m", []string{"Rare", "Bag", "Shirt"}, []int{1, 1000, 1000})
	if err != nil {
		t.Fatal(err)
	}
	type sums struct{ mean, squares, variance float64 }
	for _, adaptive := range []bool{false, true} {
		var n, sum sums
		for salt := range salts {
			sampler.salt = fmt.Sprint("salt ", salt)
			estimated, estimatedSum, variance, varianceSum, share := 0.0, 0.0, 0.0, 0.0, 1.0
			for i, ev := range list {
				p, free := sampler.Share(ev, classes[i])
				if !free {
					p *= share
				}
				if !sampler.Selects(ev, p) {
					share = min(1, share*1.1) // there is room again
					continue
				}
				if adaptive { // what was spent lowers the share of what follows
					share = max(0.2, share*0.8)
				}
				estimated += 1 / p
				estimatedSum += values[i] / p
				variance += (1 - p) / (p * p)
				varianceSum += (1 - p) / (p * p) * values[i] * values[i]
			}
			n.mean += estimated / salts
			n.squares += estimated * estimated / salts
			n.variance += variance / salts
			sum.mean += estimatedSum / salts
			sum.squares += estimatedSum * estimatedSum / salts
			sum.variance += varianceSum / salts
		}
		for name, x := range map[string]struct {
			sums
			truth float64
		}{"requests": {n, events}, "sum": {sum, total}} {
			spread := x.squares - x.mean*x.mean
			if z := (x.mean - x.truth) / math.Sqrt(spread/salts); math.Abs(z) > 4 {
				t.Errorf("adaptive %t: estimated %s are %.2f in the mean, true are %.2f: z = %.1f", adaptive, name, x.mean,
					x.truth, z)
			}
			if ratio := x.variance / spread; ratio < 0.9 || ratio > 1.1 {
				t.Errorf("adaptive %t: the variance of %s is %.2f, the estimates say %.2f", adaptive, name, spread, x.variance)
			}
		}
	}
}

// BenchmarkDecision prints what the sampling decision of one event costs.
func BenchmarkDecision(b *testing.B) {
	c := parse(b, `[{class: Bag, share: 0.1}, {labels: {tenant: a}, share: 0.3}, {share: 0.7}]`)
	sampler, _, err := c.For("m", []string{"Rare", "Bag", "Shirt"}, []int{1, 1000, 1000})
	if err != nil {
		b.Fatal(err)
	}
	ev := event("8b1f6a3e-5f0b-4f3f-9d5e-0d9b1d4c6a11", schema.ClassIndex(2), map[string]string{"tenant": "b"})
	b.ReportAllocs()
	for b.Loop() {
		p, _ := sampler.Share(ev, 2)
		sampler.Selects(ev, p)
	}
}
