package settings

import (
	"errors"
	"math"
	"testing"
	"time"
)

type group struct {
	Wait    time.Duration `name:"wait" default:"30s" min:"1s"`
	Count   int           `name:"count" default:"3" min:"1" max:"5"`
	Share   float64       `name:"share" min:"0" max:"1"`
	Mode    string        `name:"mode" default:"soft" oneof:"soft,hard"`
	Comment string
}

func TestDefaultsFillZeroFields(t *testing.T) {
	got := WithDefaults(group{Count: 4, Comment: "c"})
	if want := (group{Wait: 30 * time.Second, Count: 4, Mode: "soft", Comment: "c"}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestCheckNamesSettingValueAndBound(t *testing.T) {
	for want, change := range map[string]func(*group){
		"":                                       func(*group) {},
		"g.wait is 999ms, must be at least 1s":   func(g *group) { g.Wait = 999 * time.Millisecond },
		"g.count is 6, must be 1 to 5":           func(g *group) { g.Count = 6 },
		"g.count is 0, must be 1 to 5":           func(g *group) { g.Count = 0 },
		"g.share is NaN, must be 0 to 1":         func(g *group) { g.Share = math.NaN() },
		`g.mode is "Soft", must be soft or hard`: func(g *group) { g.Mode = "Soft" },
		"g.wait is 0s, must be at least 1s\ng.share is 2, must be 0 to 1": func(g *group) { g.Wait, g.Share = 0, 2 },
	} {
		g := WithDefaults(group{})
		change(&g)
		err := Check("g", g)
		if err == nil && want != "" || err != nil && err.Error() != want {
			t.Errorf("%v, want %q", err, want)
		}
		if err != nil && !errors.As(err, new(Error)) {
			t.Errorf("%v is no Error", err)
		}
	}
}
