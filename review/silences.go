package review

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// silencesPage is the content of silences.html.
type silencesPage struct {
	Silences []silenceRow
	Past     bool // silences that have ended are listed, too
	Here     string
	Models   []string
	Classes  []postgres.ReviewClass
	Form     url.Values // what the form to add a silence holds
}

// silenceRow is a silence as it is shown.
type silenceRow struct {
	postgres.Silence
	Class string
	State string // in force, to come, or ended
}

func rowOf(s postgres.Silence) silenceRow {
	r := silenceRow{Silence: s, Class: "every class", State: "ended"}
	switch {
	case s.ClassIndex != nil && s.ClassLabel == "":
		r.Class = fmt.Sprintf("class %d", *s.ClassIndex)
	case s.ClassIndex != nil:
		r.Class = s.ClassLabel
	}
	switch {
	case s.InForce:
		r.State = "in force"
	case s.EndedAt == nil && s.StartsAt.After(time.Now()):
		r.State = "to come"
	}
	return r
}

// span is a length of time to choose.
type span struct{ Value, Name string }

var spans = []span{
	{"1h", "1 hour"}, {"4h", "4 hours"}, {"8h", "8 hours"}, {"24h", "1 day"}, {"72h", "3 days"}, {"168h", "1 week"},
	{"336h", "2 weeks"}, {"720h", "30 days"},
}

// silencesShown is how many silences the page lists at most.
const silencesShown = 200

// startFormat is how a browser writes the time of a datetime-local field. The page takes it as UTC.
const startFormat = "2006-01-02T15:04"

func (p *Page) silences(w http.ResponseWriter, r *http.Request, reviewer string) error {
	return p.showSilences(w, r, reviewer, http.StatusOK, view{}, r.URL.Query())
}

// showSilences renders the list of silences and the form to add one.
func (p *Page) showSilences(
	w http.ResponseWriter, r *http.Request, reviewer string, status int, v view, form url.Values,
) error {
	c := silencesPage{Form: form, Here: "/silences"}
	switch past := r.URL.Query().Get("past"); past {
	case "":
	case "yes":
		c.Past, c.Here = true, "/silences?past=yes"
	default:
		return fmt.Errorf("%w: past is %q, must be yes", errForm, past)
	}
	list, err := p.store.Silences(r.Context(), "", c.Past, silencesShown)
	if err != nil {
		return err
	}
	for _, one := range list {
		c.Silences = append(c.Silences, rowOf(one))
	}
	if c.Classes, err = p.store.ReviewClasses(r.Context()); err != nil {
		return err
	}
	c.Models = models(c.Classes)
	v.Title, v.Reviewer, v.Content = "Silences", reviewer, c
	p.render(w, r, status, "silences", v)
	return nil
}

// models returns the models of classes, in their order.
func models(classes []postgres.ReviewClass) []string {
	var list []string
	for _, class := range classes {
		if !slices.Contains(list, class.Model) {
			list = append(list, class.Model)
		}
	}
	return list
}

// changeSilences adds a silence, or ends one early.
func (p *Page) changeSilences(w http.ResponseWriter, r *http.Request, reviewer string) error {
	form := r.PostForm
	err := fmt.Errorf("%w: do is %q, must be add or end", errForm, form.Get("do"))
	switch form.Get("do") {
	case "add":
		err = p.addSilence(r, reviewer)
	case "end":
		err = p.endSilence(r, reviewer)
		form = nil
	}
	switch {
	case errors.Is(err, ErrRefused):
		return p.showSilences(w, r, reviewer, http.StatusUnprocessableEntity, view{Error: sentence(err)}, form)
	case err != nil:
		return err
	}
	redirect(w, r, "/silences")
	return nil
}

// addSilence adds the silence that a form describes.
func (p *Page) addSilence(r *http.Request, reviewer string) error {
	classes, err := p.store.ReviewClasses(r.Context())
	if err != nil {
		return err
	}
	add, lasts, err := readSilence(r.PostForm, classes)
	if err != nil {
		return err
	}
	add.Author = reviewer
	id, err := p.store.AddSilence(r.Context(), add, lasts)
	if err != nil {
		return err
	}
	p.config.Log.Info("silence added", "silence", id, "model", add.Model, "class", add.ClassLabel,
		"measurement", add.Measurement, "for", lasts, "by", reviewer, "reason", add.Reason)
	return nil
}

// readSilence reads a silence from a form. The class is "model/index", or "model" for every class of the model.
func readSilence(form url.Values, classes []postgres.ReviewClass) (s postgres.Silence, lasts time.Duration, err error) {
	model, index, one := strings.Cut(form.Get("class"), "/")
	at := slices.IndexFunc(classes, func(c postgres.ReviewClass) bool {
		return c.Model == model && (!one || strconv.Itoa(c.Index) == index)
	})
	s = postgres.Silence{Model: model, Measurement: schema.MeasurementName(form.Get("measurement")),
		Reason: strings.TrimSpace(form.Get("reason"))}
	lasts, wrong := time.ParseDuration(form.Get("for"))
	switch {
	case at < 0:
		return s, 0, fmt.Errorf("%w: there is no class %q", ErrRefused, form.Get("class"))
	case s.Measurement != "" && !slices.Contains(schema.MeasurementNames(), s.Measurement):
		return s, 0, fmt.Errorf("%w: measurement is %q, must be one of %s", ErrRefused, s.Measurement,
			schema.List(schema.MeasurementNames()))
	case wrong != nil || lasts <= 0 || lasts > postgres.MaxSilence:
		return s, 0, fmt.Errorf("%w: the time is %q, must be a duration like 4h, at most a year", ErrRefused, form.Get("for"))
	case s.Reason == "":
		return s, 0, fmt.Errorf("%w: the reason is empty", ErrRefused)
	case utf8.RuneCountInString(s.Reason) > MaxComment:
		return s, 0, fmt.Errorf("%w: the reason has %d characters, the most is %d", ErrRefused,
			utf8.RuneCountInString(s.Reason), MaxComment)
	}
	if one {
		s.ClassIndex, s.ClassLabel = &classes[at].Index, classes[at].Label
	}
	if text := form.Get("from"); text != "" {
		if s.StartsAt, err = time.Parse(startFormat, text); err != nil {
			return s, 0, fmt.Errorf("%w: from is %q, must be a time like 2026-03-01T12:00", ErrRefused, text)
		}
		if s.StartsAt.After(time.Now().Add(postgres.MaxSilence)) {
			return s, 0, fmt.Errorf("%w: from is %s, must be within a year", ErrRefused, text)
		}
		if s.StartsAt.Add(lasts).Before(time.Now()) {
			return s, 0, fmt.Errorf("%w: the silence would have ended already", ErrRefused)
		}
	}
	return s, lasts, nil
}

// endSilence ends the silence that a form names.
func (p *Page) endSilence(r *http.Request, reviewer string) error {
	id, err := strconv.ParseInt(r.PostForm.Get("id"), 10, 64)
	if err != nil || id < 1 {
		return fmt.Errorf("%w: id is %q, it names no silence", errForm, r.PostForm.Get("id"))
	}
	err = p.store.EndSilence(r.Context(), id, reviewer)
	if errors.Is(err, postgres.ErrNotFound) {
		return fmt.Errorf("%w: silence %d has ended already, or does not exist", ErrRefused, id)
	}
	if err == nil {
		p.config.Log.Info("silence ended", "silence", id, "by", reviewer)
	}
	return err
}
