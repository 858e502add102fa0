package review

import (
	"bytes"
	"cmp"
	"image/png"
	"math"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"gonum.org/v1/gonum/stat/distuv"

	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

func near(a, b, tolerance float64) bool { return math.Abs(a-b) <= tolerance }

// The intervals against what defines them.
func TestIntervals(t *testing.T) {
	const confidence = 0.95
	z := distuv.UnitNormal.Quantile(0.975)
	for _, c := range [][2]int{{0, 1}, {1, 1}, {3, 10}, {8, 10}, {0, 40}, {40, 40}, {1, 500}, {250, 500}} {
		k, n := c[0], c[1]
		p := float64(k) / float64(n)
		// Wilson's ends are the rates that lie z standard errors of their own from the observed one.
		w := wilson(float64(k), float64(n), confidence)
		for _, end := range []float64{w.Low, w.High} {
			if end > 0 && end < 1 && !near(math.Abs(p-end), z*math.Sqrt(end*(1-end)/float64(n)), 1e-9) {
				t.Errorf("wilson(%d, %d) ends at %v", k, n, end)
			}
		}
		// Clopper and Pearson's are the rates at which what was observed, or more extreme, has the probability 2.5%.
		e := clopperPearson(float64(k), float64(n), confidence)
		if k > 0 {
			if tail := 1 - (distuv.Binomial{N: float64(n), P: e.Low}).CDF(float64(k-1)); !near(tail, 0.025, 1e-6) {
				t.Errorf("clopperPearson(%d, %d) starts at %v, with tail %v", k, n, e.Low, tail)
			}
		}
		if k < n {
			if tail := (distuv.Binomial{N: float64(n), P: e.High}).CDF(float64(k)); !near(tail, 0.025, 1e-6) {
				t.Errorf("clopperPearson(%d, %d) ends at %v, with tail %v", k, n, e.High, tail)
			}
		}
		if !(e.Low <= p && p <= e.High && w.Low <= p && p <= w.High) {
			t.Errorf("%d of %d: %+v, %+v", k, n, w, e)
		}
	}
	for _, e := range []Estimate{wilson(0, 0, confidence), clopperPearson(0, 0, confidence)} {
		if e.Known || e.Low != 0 || e.High != 1 {
			t.Errorf("nothing observed: %+v", e)
		}
	}
}

// evenly returns the tally of traffic of which every event was scored.
func evenly(t postgres.ReviewTally) postgres.ReviewTally {
	share := func(k, n int) (float64, float64) { return float64(k) / float64(max(n, 1)), float64(n) }
	t.Requests, t.RequestsAlerted = float64(t.Scored), float64(t.Alerted)
	t.EventsShare, t.EventsWorth = share(t.EventsTrue, t.EventsTrue+t.EventsFalse)
	t.SamplesShare, t.SamplesWorth = share(t.SamplesTrue, t.SamplesTrue+t.SamplesFalse)
	return t
}

func TestEstimate(t *testing.T) {
	// 100 alerted events, 40 of 50 right; 9,900 without an alert, of which 2 of 99 were missed: 80 found, 200 missed.
	s := estimate(evenly(postgres.ReviewTally{
		Scored: 10_000, Alerted: 100, AlertsConfirmed: 30, AlertsExpected: 10, AlertsFalse: 10, AlertsOpen: 50,
		EventsTrue: 40, EventsFalse: 10,
		Sampled: 99, SamplesTrue: 2, SamplesFalse: 97,
	}), 0.95)
	if !near(s.Precision.Value, 0.8, 1e-12) || !near(s.MissRate.Value, 2.0/99, 1e-12) ||
		!near(s.Recall.Value, 80.0/280, 1e-12) {
		t.Errorf("%+v", s)
	}
	if !(s.Recall.Low < s.Recall.Value && s.Recall.Value < s.Recall.High && s.Recall.Low > 0 && s.Recall.High < 1) {
		t.Errorf("recall %+v", s.Recall)
	}
	for name, tally := range map[string]postgres.ReviewTally{
		"nothing":            {},
		"nothing reviewed":   {Scored: 1000, Alerted: 10, AlertsOpen: 10, Sampled: 10},
		"no sample reviewed": {Scored: 1000, Alerted: 10, AlertsConfirmed: 10, EventsTrue: 10, Sampled: 10},
		"all fine":           {Scored: 1000, Alerted: 10, AlertsFalse: 10, EventsFalse: 10, Sampled: 10, SamplesFalse: 10},
	} {
		s := estimate(evenly(tally), 0.95)
		if s.Recall.Known || s.Recall.Low < 0 || s.Recall.High > 1 || math.IsNaN(s.Recall.Low+s.Recall.High+s.Recall.Value) {
			t.Errorf("%s: recall %+v", name, s.Recall)
		}
	}
}

// The interval of recall covers the truth at least as often as it says, over many simulated months of review.
func TestRecallCovers(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const months = 2000
	binomial := func(n int, p float64) (k int) {
		for range n {
			if r.Float64() < p {
				k++
			}
		}
		return k
	}
	for _, c := range []struct {
		alerted, unalerted, reviewed, sampled int
		precision, miss                       float64
	}{{60, 4000, 40, 80, 0.7, 0.01}, {200, 20000, 100, 200, 0.9, 0.002}, {30, 1000, 30, 30, 0.3, 0.05}} {
		found, missed := float64(c.alerted)*c.precision, float64(c.unalerted)*c.miss
		truth := found / (found + missed)
		covered := 0
		for range months {
			right, wrong := binomial(c.reviewed, c.precision), binomial(c.sampled, c.miss)
			e := estimate(evenly(postgres.ReviewTally{
				Scored: c.alerted + c.unalerted, Alerted: c.alerted, EventsTrue: right, EventsFalse: c.reviewed - right,
				Sampled: c.sampled, SamplesTrue: wrong, SamplesFalse: c.sampled - wrong,
			}), 0.95).Recall
			if e.Low <= truth && truth <= e.High {
				covered++
			}
		}
		// Three standard errors of the simulation below 95%.
		if share := float64(covered) / months; share < 0.95-3*math.Sqrt(0.95*0.05/months) {
			t.Errorf("%+v: the interval covers %.1f%% of the time", c, 100*share)
		}
	}
}

func TestImages(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, shape := range []ensemble.Image{{Channels: 1, Height: 8, Width: 8}, {Channels: 3, Height: 40, Width: 700},
		{Channels: 3, Height: 512, Width: 512}} {
		pixels := make([]float32, shape.Size())
		for i := range pixels {
			pixels[i] = float32(3*r.Float64() - 1.5) // noise, which no PNG makes smaller; some beyond the bounds
		}
		body, err := encodeImage(pixels, shape, 512)
		if err != nil {
			t.Fatal(err)
		}
		values := make([]float64, shape.Width*shape.Height)
		for i := range values {
			values[i] = 1.7 * r.Float64()
		}
		heat, err := encodeMap(values, shape.Width, shape.Height, math.Log(5), 512)
		if err != nil {
			t.Fatal(err)
		}
		for name, b := range map[string][]byte{"image": body, "map": heat} {
			picture, err := png.Decode(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if w, h := picture.Bounds().Dx(), picture.Bounds().Dy(); w > 512 || h > 512 || w != min(shape.Width, 512) ||
				len(b) > 1<<20 {
				t.Errorf("%s of %+v: %d x %d, %d bytes", name, shape, w, h, len(b))
			}
		}
	}
	if _, err := encodeImage(make([]float32, 5), ensemble.Image{Channels: 1, Height: 2, Width: 2}, 512); err == nil {
		t.Error("an image of the wrong size was encoded")
	}
	if _, err := encodeMap(make([]float64, 4), 2, 2, 0, 512); err == nil {
		t.Error("a map without a bound was encoded")
	}
	if zero, most := heatColor(0), heatColor(1); zero.A != 0 || most != heatStops[len(heatStops)-1] {
		t.Errorf("the map's colors go from %v to %v", zero, most)
	}
}

// Whatever the numbers, a plot stays within its box.
func TestPlots(t *testing.T) {
	for name, c := range map[string]struct {
		class, all []float64
		score      float64
		bounds     []bound
	}{
		"nothing":   {nil, nil, 1, nil},
		"one value": {[]float64{2, 2, 2}, []float64{2}, 2, nil},
		"zero":      {[]float64{0, 0, 0.1}, nil, 0, []bound{{Value: 0.05, Compared: 0.05, Severity: "warn", Scope: "class"}}},
		"wide": {[]float64{1e-7, 1e-5, 3}, []float64{1e-9, 1e4}, 1e3,
			[]bound{{Value: 1, Compared: 1, Severity: "warn", Scope: "class"},
				{Value: 1.01, Compared: 1.01, Severity: "critical", Scope: "limit"}}},
		"negative": {[]float64{-1e-9, 0.2}, nil, -1e-9, nil},
	} {
		p := distribution(c.class, c.all, c.score, c.bounds, "x")
		for _, b := range p.Bars {
			if b.X < 0 || b.X+b.W > p.Width || b.Y < 0 || b.Y+b.H > p.Base+0.2 || math.IsNaN(b.X+b.Y+b.W+b.H) {
				t.Errorf("%s: bar %+v", name, b)
			}
		}
		for _, m := range append(p.Lines, p.Ticks...) {
			if !(m.X >= 0 && m.X <= p.Width) {
				t.Errorf("%s: mark %+v", name, m)
			}
		}
		if strings.Contains(p.Shadow, "NaN") || len(p.Ticks) == 0 || len(p.Ticks) > 16 {
			t.Errorf("%s: %d ticks, shadow %q", name, len(p.Ticks), p.Shadow)
		}
	}
	if p := trajectory([]TrajectoryDot{{0, 0.1, 1e-3}, {10, 0.2, 5}, {19, 0, 0}}); p.Empty || len(p.Dots) != 3 ||
		strings.Contains(p.Path, "NaN") {
		t.Errorf("%+v", p)
	}
	if p := trajectory([]TrajectoryDot{{0, 0, 0}}); strings.Contains(p.Path, "NaN") {
		t.Errorf("%+v", p)
	}
	for v, want := range map[float64]string{0: "0", 0.0271234: "0.0271", 1.609: "1.61", 122.4: "122", 1e-9: "1e-09",
		12345: "12345"} {
		if have := number(v); have != want {
			t.Errorf("number(%v) is %q, want %q", v, have, want)
		}
	}
}

// Who is let in, and as whom.
func TestAccess(t *testing.T) {
	loopback, any := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 8080}, &net.TCPAddr{IP: net.IPv4zero, Port: 8080}
	const token = "correct horse battery"
	for name, c := range map[string]struct {
		access Access
		on     net.Addr
	}{
		"open to all":    {Access{}, any},
		"short token":    {Access{Token: "short"}, any},
		"not an address": {Access{Token: token, URL: "review.example.com"}, any},
	} {
		if _, err := newAccess(c.access, c.on, nil); err == nil {
			t.Errorf("%s: was accepted", name)
		}
	}
	alice := func(a *access) string { c := a.cookie("alice"); return c.Name + "=" + c.Value }
	other, err := newAccess(Access{Token: "another token of some length"}, any, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		access  Access
		on      net.Addr
		from    string // RemoteAddr
		host    string
		headers map[string]string
		cookie  func(*access) string
		want    string // "" is refused
	}{
		{name: "loopback", on: loopback, want: "local"},
		{name: "loopback, named", on: loopback, cookie: alice, want: "alice"},
		{name: "loopback, IPv6", on: loopback, host: "[::1]:8080", want: "local"},
		{name: "loopback, foreign name", on: loopback, host: "evil.example.com", want: ""},
		{name: "loopback, name with a good prefix", on: loopback, host: "127.0.0.1.evil.example.com:8080", want: ""},
		{name: "loopback, the page's own name", access: Access{URL: "https://review.example.com"}, on: loopback,
			host: "review.example.com", want: "local"},
		{name: "no token given", access: Access{Token: token}, on: any, want: ""},
		{name: "token, bearer", access: Access{Token: token}, on: any,
			headers: map[string]string{"Authorization": "Bearer " + token}, want: "token"},
		{name: "token, wrong bearer", access: Access{Token: token}, on: any,
			headers: map[string]string{"Authorization": "Bearer " + token + "x"}, want: ""},
		{name: "token, empty bearer", access: Access{Token: token}, on: any,
			headers: map[string]string{"Authorization": "Bearer "}, want: ""},
		{name: "token, session", access: Access{Token: token}, on: any, cookie: alice, want: "alice"},
		{name: "token, session of another token", access: Access{Token: token}, on: any,
			cookie: func(*access) string { return alice(other) }, want: ""},
		{name: "token, forged session", access: Access{Token: token}, on: any,
			cookie: func(a *access) string { return strings.Replace(alice(a), "=", "=Ym9i.", 1) }, want: ""},
		{name: "token, old session", access: Access{Token: token}, on: any,
			cookie: func(a *access) string { return cookieName + "=Ym9i.1." + a.sign("Ym9i", "1") }, want: ""},
		{name: "header", access: Access{Header: "X-User"}, on: any, headers: map[string]string{"X-User": "carol"},
			want: "carol"},
		{name: "no header given", access: Access{Header: "X-User"}, on: any, want: ""},
		{name: "header, unprintable", access: Access{Header: "X-User"}, on: any,
			headers: map[string]string{"X-User": "a\x07b"}, want: ""},
		{name: "header, not from the proxy", access: Access{Header: "X-User"}, on: any, from: "10.0.0.9:1",
			headers: map[string]string{"X-User": "mallory"}, want: ""},
		{name: "header, from the proxy", access: Access{Header: "X-User",
			Proxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}, on: any, from: "[::ffff:10.0.0.9]:1",
			headers: map[string]string{"X-User": "carol"}, want: "carol"},
		{name: "header, loopback is not the proxy", access: Access{Header: "X-User",
			Proxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}, on: any,
			headers: map[string]string{"X-User": "mallory"}, want: ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := newAccess(c.access, c.on, nil)
			if err != nil {
				t.Fatal(err)
			}
			r := httptest.NewRequest("GET", "/", nil)
			r.RemoteAddr, r.Host = cmp.Or(c.from, "127.0.0.1:5000"), cmp.Or(c.host, "127.0.0.1:8080")
			for name, value := range c.headers {
				r.Header.Set(name, value)
			}
			if c.cookie != nil {
				r.Header.Set("Cookie", c.cookie(a))
			}
			if name, err := a.who(r); (err == nil) != (c.want != "") || err == nil && name != c.want {
				t.Errorf("%q, %v; want %q", name, err, c.want)
			}
		})
	}
	secure, err := newAccess(Access{Token: token, URL: "https://review.example.com"}, any, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c := secure.cookie("alice"); !c.Secure || !c.HttpOnly || c.SameSite == 0 {
		t.Errorf("cookie %+v", c)
	}
	for to, want := range map[string]string{"/review/1?a=b": "/review/1?a=b", "": "/", "https://evil.example.com/": "/",
		"//evil.example.com": "/", `/\evil.example.com`: "/", "javascript:alert(1)": "/"} {
		if have := target(to); have != want {
			t.Errorf("target(%q) is %q, want %q", to, have, want)
		}
	}
}
