package review

import (
	"bytes"
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// The page's files. htmx.min.js is dist/htmx.min.js of the npm package htmx.org 2.0.11 (Zero-Clause BSD, see
// htmx.LICENSE), SHA-256 d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717.
//
//go:embed static templates
var assetFiles embed.FS

// PageConfig is the configuration of a Page.
type PageConfig struct {
	Access Access
	Window time.Duration // how far back the distribution of a class reaches. Defaults to 90 days

	Registerer prometheus.Registerer // Defaults to none
	Log        *slog.Logger          // Defaults to slog.Default()
}

// Page is the review page: the queue, one review, the statistics. It is safe for concurrent use.
type Page struct {
	config    PageConfig
	store     *postgres.Store
	access    *access
	templates map[string]*template.Template
	handler   http.Handler
}

// NewPage returns the page that is served on the listener's address. It fails if other machines can
// reach that address without authentication, or if the Access is out of its bounds.
func NewPage(store *postgres.Store, address net.Addr, c PageConfig) (*Page, error) {
	if c.Window == 0 {
		c.Window = 90 * 24 * time.Hour
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	a, err := newAccess(c.Access, address, c.Registerer)
	if err != nil {
		return nil, err
	}
	p := &Page{config: c, store: store, access: a, templates: map[string]*template.Template{}}
	for _, name := range []string{"queue", "review", "alert", "silences", "stats", "login", "error"} {
		t, err := template.New("layout.html").Funcs(functions).ParseFS(assetFiles, "templates/layout.html",
			"templates/"+name+".html")
		if err != nil {
			return nil, fmt.Errorf("review: %w", err)
		}
		p.templates[name] = t
	}
	static, err := fs.Sub(assetFiles, "static")
	if err != nil {
		return nil, err
	}
	p.handler = secured(p.routes(static))
	return p, nil
}

// routes returns the page's routes.
func (p *Page) routes(static fs.FS) http.Handler {
	mux := http.NewServeMux()
	change := []string{"do", "version", "comment", "assignee"}
	silence := []string{"past", "class", "measurement", "for", "from", "reason"}
	queue, visit := append([]string{"at", "last"}, queueParameters...), []string{"in", "done", "last"}
	mux.HandleFunc("GET /{$}", p.page(parameters{query: queue}, p.queue))
	mux.HandleFunc("POST /{$}", p.page(parameters{query: queue, form: []string{"do", "comment", "assignee"},
		many: []string{"pick"}}, p.bulk))
	mux.HandleFunc("GET /queue.csv", p.page(parameters{query: queueParameters}, p.export))
	mux.HandleFunc("POST /dismiss", p.page(parameters{form: []string{"id", "to"}}, p.dismiss))
	mux.HandleFunc("GET /review/{id}", p.page(parameters{query: visit}, p.review))
	mux.HandleFunc("POST /review/{id}", p.page(parameters{query: visit, form: change}, p.act))
	mux.HandleFunc("GET /review/{id}/evidence/{name}", p.page(parameters{}, p.evidence))
	mux.HandleFunc("GET /silences", p.page(parameters{query: silence}, p.silences))
	mux.HandleFunc("POST /silences", p.page(parameters{query: []string{"past"},
		form: append([]string{"do", "id"}, silence...)}, p.changeSilences))
	mux.HandleFunc("GET /stats", p.page(parameters{query: []string{"model", "days"}}, p.stats))
	mux.HandleFunc("GET /login", p.login)
	mux.HandleFunc("POST /login", p.login)
	mux.HandleFunc("POST /logout", p.logout)
	assets := http.StripPrefix("/static/", http.FileServerFS(static))
	mux.HandleFunc("GET /static/{file}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=300")
		assets.ServeHTTP(w, r)
	})
	mux.HandleFunc("/", p.page(parameters{any: true}, func(http.ResponseWriter, *http.Request, string) error {
		return errNoPage
	}))
	return mux
}

// ServeHTTP answers one request.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) { p.handler.ServeHTTP(w, r) }

// view is what every template gets.
type view struct {
	Title    string
	Reviewer string
	Open     bool // the page is for this machine alone
	Token    bool // a session can be ended
	Error    string
	Note     string // what was done
	Content  any
}

// page wraps a handler that takes the parameters and knows the reviewer; its error becomes an answer.
func (p *Page) page(
	takes parameters, f func(w http.ResponseWriter, r *http.Request, reviewer string) error,
) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := p.access.single(r); err != nil {
			p.refuse(w, r, err)
			return
		}
		reviewer, err := p.access.who(r)
		if err != nil {
			p.refuse(w, r, err)
			return
		}
		err = takes.check(w, r)
		if err == nil {
			err = f(w, r, reviewer)
		}
		if err != nil {
			p.fail(w, r, reviewer, err)
		}
	}
}

// refuse answers a visitor who is not known.
func (p *Page) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, errNoSession) {
		if r.Method == http.MethodGet && strings.Contains(r.Header.Get("Accept"), "text/html") &&
			r.Header.Get("HX-Request") == "" {
			http.Redirect(w, r, "/login?to="+url.QueryEscape(r.URL.RequestURI()), http.StatusSeeOther)
			return
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="decuwatch review"`)
		w.Header().Set("HX-Redirect", "/login")
		http.Error(w, err.Error(), http.StatusUnauthorized)
		return
	}
	status := http.StatusForbidden
	switch {
	case errors.Is(err, errForm):
		status = http.StatusBadRequest
	case errors.Is(err, errWrongToken):
		p.warnToken(r)
		status = http.StatusUnauthorized
	case errors.Is(err, errSlowed):
		w.Header().Set("Retry-After", retryAfter)
		status = http.StatusTooManyRequests
	}
	http.Error(w, err.Error(), status)
}

// retryAfter is when an address that was slowed down may try again, in seconds.
var retryAfter = strconv.Itoa(int(wrongTokenEvery.Seconds()))

// warnToken logs a wrong token. Those that are not looked at are counted only.
func (p *Page) warnToken(r *http.Request) {
	p.config.Log.Warn("review page: wrong token", "address", r.RemoteAddr, "path", r.URL.Path)
}

// fail answers an error.
func (p *Page) fail(w http.ResponseWriter, r *http.Request, reviewer string, err error) {
	status := http.StatusInternalServerError
	text := "The database did not answer as it should. Try again; the log has the reason."
	var large *http.MaxBytesError
	switch {
	case errors.Is(err, context.Canceled) && r.Context().Err() != nil:
		return
	case errors.Is(err, postgres.ErrNotFound):
		status, text = http.StatusNotFound, sentence(err)
	case errors.Is(err, errForm), errors.Is(err, postgres.ErrAmbiguous):
		status, text = http.StatusBadRequest, sentence(err)
	case errors.Is(err, ErrRefused):
		status, text = http.StatusUnprocessableEntity, sentence(err)
	case errors.Is(err, ErrConflict):
		status, text = http.StatusConflict, sentence(err)
	case errors.As(err, &large):
		status, text = http.StatusRequestEntityTooLarge, "That is too long."
	default:
		p.config.Log.Error("review page", "path", r.URL.Path, "err", err)
	}
	p.render(w, r, status, "error", view{Title: http.StatusText(status), Reviewer: reviewer, Error: text})
}

// sentence returns an error as a sentence.
func sentence(err error) string {
	s := err.Error()
	return strings.ToUpper(s[:1]) + s[1:] + "."
}

func (p *Page) render(w http.ResponseWriter, r *http.Request, status int, name string, v view) {
	v.Open = p.access.Token == "" && p.access.Header == ""
	v.Token = p.access.Token != ""
	var out bytes.Buffer
	if err := p.templates[name].Execute(&out, v); err != nil {
		p.config.Log.Error("review page", "template", name, "path", r.URL.Path, "err", err)
		http.Error(w, "The page could not be made; the log has the reason.", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(out.Bytes()) // the visitor may have gone
}

var errNoPage = fmt.Errorf("there is no such page: %w", postgres.ErrNotFound)

// reviewPage is the content of review.html.
type reviewPage struct {
	Details
	Resolved   bool
	Images     []string // addresses
	Map        string
	Producer   string   // image of the table that stands for the production model, or ""
	References []string // addresses of images that the reference makes of the class
	Numbers    *Numbers
	Trajectory plot
	Measures   []measurePage
	Labels     []pair
	Receipt    []pair
	Waiting    bool // for evidence
	Expired    bool // evidence was dropped by retention
	Visit      visitPage
}

type pair struct{ Name, Value string }

// measurePage is one measurement of a score among those of its class.
type measurePage struct {
	Name     schema.MeasurementName
	Question string
	schema.Measurement
	Below  float64 // share of the class's other scores that are lower
	N      int
	Plot   plot
	Likely []likely      // what the judge says; of image_risk only
	Fired  *schema.Alert // the alert that it raised, or nil
	Bounds []bound
}

// questions are what the measurements answer.
var questions = map[schema.MeasurementName]string{
	schema.ClassGap:    "Does the ensemble know this class?",
	schema.RequestRisk: "How risky is this request within its class?",
	schema.ImageRisk:   "How likely is the image not of this class, as a judge sees it?",
}

func (p *Page) review(w http.ResponseWriter, r *http.Request, reviewer string) error {
	s, err := readSitting(r.URL.Query())
	if err != nil {
		return err
	}
	return p.show(w, r, reviewer, r.PathValue("id"), s, nil)
}

// show renders a review, with what went wrong on the way there.
func (p *Page) show(
	w http.ResponseWriter, r *http.Request, reviewer, id string, s sitting, wrong error,
) error {
	ctx := r.Context()
	v, err := p.store.ReviewByID(ctx, id)
	if errors.Is(err, postgres.ErrNotFound) && wrong == nil {
		alert, notFound := p.store.AlertByID(ctx, id)
		if notFound == nil { // one about no single score
			p.render(w, r, http.StatusOK, "alert", view{Title: Words(alert.Kind), Reviewer: reviewer, Content: alert})
			return nil
		}
		if !errors.Is(notFound, postgres.ErrNotFound) {
			return notFound
		}
	}
	if err != nil {
		return err
	}
	if v.ID != id && wrong == nil {
		http.Redirect(w, r, s.address(v.ID), http.StatusSeeOther)
		return nil
	}
	c, err := p.load(ctx, v)
	if err != nil {
		return err
	}
	if c.Visit, err = p.visit(ctx, s, v.ID); err != nil {
		return err
	}
	status, text := http.StatusOK, ""
	if wrong != nil {
		status, text = http.StatusUnprocessableEntity, sentence(wrong)
		if errors.Is(wrong, ErrConflict) {
			status = http.StatusConflict
		}
	}
	p.render(w, r, status, "review", view{Title: v.ClassLabel, Reviewer: reviewer, Error: text, Content: c})
	return nil
}

// load reads what a review's page shows.
func (p *Page) load(ctx context.Context, v postgres.Review) (c reviewPage, err error) {
	c.Resolved = v.State == schema.ReviewResolved
	if c.Details, err = details(ctx, p.store, v); err != nil {
		return c, err
	}
	if c.Score != nil {
		for _, name := range slices.Sorted(maps.Keys(c.Score.Event.Data.Labels)) {
			c.Labels = append(c.Labels, pair{name, c.Score.Event.Data.Labels[name]})
		}
		c.Receipt = receipt(c.Score.Receipt)
		if err := p.measures(ctx, &c); err != nil {
			return c, err
		}
	}
	for _, f := range c.files {
		address := "/review/" + url.PathEscape(v.ID) + "/evidence/" + url.PathEscape(f.Name)
		switch {
		case strings.HasPrefix(f.Name, "image-"):
			c.Images = append(c.Images, address)
		case strings.HasPrefix(f.Name, fileReference):
			c.References = append(c.References, address)
		case f.Name == fileMap:
			c.Map = address
		case f.Name == fileProducer:
			c.Producer = address
		case f.Name == fileNumbers:
			file, err := p.store.EvidenceFile(ctx, v.ID, f.Name)
			if err != nil {
				return c, err
			}
			c.Numbers = &Numbers{}
			if err := json.Unmarshal(file.Body, c.Numbers); err != nil {
				return c, fmt.Errorf("numbers of %s: %w", v.ID, err)
			}
			c.Trajectory = trajectory(c.Numbers.Trajectory)
		}
	}
	c.Waiting = v.Evidence == postgres.EvidencePending
	c.Expired = v.Evidence == postgres.EvidenceDone && len(c.files) == 0
	return c, nil
}

// measures adds the measurements of the score, each among those of its class.
func (p *Page) measures(ctx context.Context, c *reviewPage) error {
	s := c.Score
	table, err := alerts.ReadTable(ctx, p.store)
	if err != nil {
		return err
	}
	for _, measured := range s.Measurements() {
		m := measurePage{Name: measured.Name, Question: questions[measured.Name], Measurement: measured.Measurement}
		const most = 5000
		since := time.Now().Add(-p.config.Window)
		values := func(class *int) ([]float64, error) {
			return p.store.ScoreValues(ctx, s.Series(), m.Name, class, since, most)
		}
		class, err := values(&s.ClassIndex)
		if err != nil {
			return err
		}
		all, err := values(nil)
		if err != nil {
			return err
		}
		below := 0
		for _, v := range class {
			if v < m.Value {
				below++
			}
		}
		m.N = len(class)
		if m.N > 1 {
			m.Below = float64(below) / float64(m.N-1)
		}
		m.Bounds = bounds(table, s, m.Name, m.Measurement)
		if i := slices.IndexFunc(c.Alerts, func(a schema.Alert) bool { return a.Measurement == m.Name }); i >= 0 {
			m.Fired = &c.Alerts[i]
		}
		m.Plot = distribution(class, all, m.Value, m.Bounds, s.ClassLabel)
		if m.Name == schema.ImageRisk {
			m.Likely = c.verdict()
		}
		c.Measures = append(c.Measures, m)
	}
	return nil
}

// bounds returns the thresholds that decide on a measurement of the score, warn before critical.
func bounds(table *alerts.Table, s *schema.Score, measurement schema.MeasurementName, m schema.Measurement) []bound {
	var list []bound
	for _, th := range table.Applicable(s.Series(), measurement, s.ClassIndex).All() {
		_, at, byDistance := alerts.Compared(m, th)
		list = append(list, bound{
			Value: th.Value, Compared: at, ByDistance: byDistance, Severity: th.Severity, Scope: th.Scope,
		})
	}
	slices.SortStableFunc(list, func(a, b bound) int { return -cmp.Compare(a.Severity, b.Severity) })
	return list
}

// receipt returns a receipt as it is shown.
func receipt(r schema.Receipt) []pair {
	list := []pair{
		{"Ensemble", r.EnsembleDigest}, {"Settings", r.Settings}, {"Profile", r.Profile}, {"Seed",
			strconv.FormatUint(r.Seed, 10)}, {"Noise", r.Noise},
		{"Carrier", "component " + strconv.Itoa(r.Carrier+1)}, {"U-Net rows", strconv.Itoa(r.Rows)}, {"Runtime",
			r.Runtime + " on " + r.Device},
	}
	for _, d := range r.Deviations {
		list = append(list, pair{"Deviation", d})
	}
	return list
}

// act changes a review as a button or a form says.
func (p *Page) act(w http.ResponseWriter, r *http.Request, reviewer string) error {
	id := r.PathValue("id")
	s, err := readSitting(r.URL.Query())
	if err != nil {
		return err
	}
	version, err := readVersion(r.PostForm.Get("version"))
	if err != nil {
		return err
	}
	do := r.PostForm.Get("do")
	if do == "evidence" {
		if err := p.store.RetryEvidence(r.Context(), id); err != nil {
			return err
		}
		return p.done(w, r, reviewer, id, s)
	}
	change := changeOf(r.PostForm, reviewer)
	change.Version = version
	changed, err := change.Apply(r.Context(), p.store, id)
	switch {
	case errors.Is(err, ErrRefused) || errors.Is(err, ErrConflict):
		return p.show(w, r, reviewer, id, s, err)
	case err != nil:
		return err
	case do == undo:
		redirect(w, r, s.address(changed.ID))
		return nil
	case change.Action == Resolve && s.in:
		next, err := p.next(r.Context(), s, changed.ID)
		if err != nil {
			return err
		}
		redirect(w, r, next)
		return nil
	}
	return p.done(w, r, reviewer, id, s)
}

// undo is the button that takes the last verdict back and returns to its review.
const undo = "undo"

// changeOf returns the change that a form asks for.
func changeOf(form url.Values, reviewer string) Change {
	do := form.Get("do")
	change := Change{Action: do, Actor: reviewer, Comment: form.Get("comment")}
	switch {
	case slices.Contains(schema.ReviewVerdicts(), schema.ReviewVerdict(do)):
		change.Action, change.Verdict = Resolve, schema.ReviewVerdict(do)
	case do == undo:
		change.Action = Reopen
	case do == Assign:
		change.Assignee, change.Comment = strings.TrimSpace(form.Get("assignee")), ""
	}
	return change
}

func readVersion(text string) (int, error) {
	version, err := strconv.Atoi(text)
	if err != nil || version < 1 || version > maxInteger {
		return 0, fmt.Errorf("%w: version is %q, it names no version of the review", errForm, text)
	}
	return version, nil
}

// done shows the review after a change.
func (p *Page) done(w http.ResponseWriter, r *http.Request, reviewer, id string, s sitting) error {
	if r.Header.Get("HX-Request") == "" {
		http.Redirect(w, r, s.address(id), http.StatusSeeOther)
		return nil
	}
	return p.show(w, r, reviewer, id, s, nil)
}

// redirect sends the browser to another page.
func redirect(w http.ResponseWriter, r *http.Request, address string) {
	if r.Header.Get("HX-Request") != "" {
		w.Header().Set("HX-Redirect", address)
		return
	}
	http.Redirect(w, r, address, http.StatusSeeOther)
}

func (p *Page) evidence(w http.ResponseWriter, r *http.Request, _ string) error {
	f, err := p.store.EvidenceFile(r.Context(), r.PathValue("id"), r.PathValue("name"))
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", f.ContentType)
	w.Header().Set("Cache-Control", "private, max-age=3600")
	http.ServeContent(w, r, "", f.MadeAt, bytes.NewReader(f.Body))
	return nil
}

// statsPage is the content of stats.html.
type statsPage struct {
	Stats
	Days     int
	Spans    []int
	Models   []string
	Model    string
	Canaries map[string]int
}

func (p *Page) stats(w http.ResponseWriter, r *http.Request, reviewer string) error {
	c := statsPage{Days: 30, Spans: []int{1, 7, 30, 90}, Model: r.URL.Query().Get("model")}
	if s := r.URL.Query().Get("days"); s != "" {
		days, err := strconv.Atoi(s)
		if err != nil || days < 1 || days > 3650 {
			return fmt.Errorf("%w: days is %q, must be 1 to 3650", errForm, s)
		}
		c.Days = days
	}
	classes, err := p.store.ReviewClasses(r.Context())
	if err != nil {
		return err
	}
	c.Models = models(classes)
	now := time.Now()
	from := now.AddDate(0, 0, -c.Days)
	if c.Stats, err = LoadStats(r.Context(), p.store, c.Model, nil, from, now); err != nil {
		return err
	}
	if c.Canaries, err = p.store.CanaryCounts(r.Context(), c.Model, from); err != nil {
		return err
	}
	p.render(w, r, http.StatusOK, "stats", view{Title: "Statistics", Reviewer: reviewer, Content: c})
	return nil
}

// loginPage is the content of login.html.
type loginPage struct {
	To   string
	Name string
}

// login asks for a name, and for the token if there is one.
func (p *Page) login(w http.ResponseWriter, r *http.Request) {
	if p.access.Header != "" || p.access.Token == "" && !p.access.local(r.Host) {
		p.refuse(w, r, errHost)
		return
	}
	takes := parameters{query: []string{"to"}, form: []string{"to", "name", "token"}}
	err := p.access.single(r)
	if err == nil {
		err = takes.check(w, r)
	}
	if err != nil {
		p.fail(w, r, "", err)
		return
	}
	c := loginPage{To: target(r.FormValue("to")), Name: strings.TrimSpace(r.PostFormValue("name"))}
	if r.Method == http.MethodGet {
		p.render(w, r, http.StatusOK, "login", view{Title: "Log in", Content: c})
		return
	}
	wrong := ""
	if err := checkName(c.Name); err != nil {
		wrong = "Your name " + err.Error() + "."
	}
	status := http.StatusForbidden
	if p.access.Token != "" {
		err := p.access.tokens.check(r, strings.TrimSpace(r.PostFormValue("token")))
		switch {
		case errors.Is(err, errWrongToken):
			p.warnToken(r)
			wrong = sentence(err)
		case errors.Is(err, errSlowed):
			w.Header().Set("Retry-After", retryAfter)
			wrong, status = sentence(err), http.StatusTooManyRequests
		}
	}
	if wrong != "" {
		p.render(w, r, status, "login", view{Title: "Log in", Error: wrong, Content: c})
		return
	}
	http.SetCookie(w, p.access.cookie(c.Name))
	http.Redirect(w, r, c.To, http.StatusSeeOther)
}

// target returns an address below this page, to go to after a login.
func target(to string) string {
	u, err := url.Parse(to)
	if err != nil || u.IsAbs() || u.Host != "" || !strings.HasPrefix(u.Path, "/") || strings.HasPrefix(to, "//") ||
		strings.ContainsRune(to, '\\') {
		return "/"
	}
	return u.RequestURI()
}

func (p *Page) logout(w http.ResponseWriter, r *http.Request) {
	http.SetCookie(w, p.access.cookie(""))
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

// functions are what templates may call.
var functions = template.FuncMap{
	"number":       number,
	"words":        Words,
	"short":        short,
	"tail":         tail,
	"orders":       postgres.ReviewOrders,
	"highest":      func(o postgres.ReviewOrder) bool { return o != postgres.ReviewNewest && o != postgres.ReviewOldest },
	"measurements": schema.MeasurementNames,
	"spans":        func() []span { return spans },
	"severities":   func() []schema.Severity { return []schema.Severity{schema.SeverityCritical, schema.SeverityWarn} },
	"inc":          func(i int) int { return i + 1 },
	"percent": func(v float64) string {
		switch {
		case v > 0 && v < 0.001:
			return strconv.FormatFloat(100*v, 'g', 2, 64) + "%"
		case v > 0.999 && v < 1:
			return strconv.FormatFloat(100*v, 'f', 2, 64) + "%"
		}
		return strconv.FormatFloat(100*v, 'f', 1, 64) + "%"
	},
	"scale": func(v, most float64) float64 { return round(v * most) },
	"sub":   func(a, b float64) float64 { return round(a - b) },
	"time":  terminal.Time,
	"stamp": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"ago": func(t time.Time) string {
		switch d := time.Since(t); {
		case d < time.Minute:
			return "just now"
		case d < time.Hour:
			return fmt.Sprintf("%d min ago", int(d.Minutes()))
		case d < 48*time.Hour:
			return fmt.Sprintf("%d h ago", int(d.Hours()))
		default:
			return fmt.Sprintf("%d days ago", int(d.Hours()/24))
		}
	},
}
