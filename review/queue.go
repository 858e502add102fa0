package review

import (
	"cmp"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// queuePage is the content of queue.html.
type queuePage struct {
	Tabs     []tab
	Models   []string
	Classes  []postgres.ReviewClass
	Filter   url.Values
	Rows     []row
	Previous link // to the page before this one
	Next     link
	Range    string // which rows these are: "31 to 60 of 95"
	Chosen   string // id of the row that the keys start from, or ""
	Here     string // address of this page, for refreshing
	CSV      string // address of the queue as CSV
	Evidence postgres.EvidenceStats
	Notices  []schema.Alert
	Narrowed bool // by severity: random draws are not among the rows
	Undo     *undoPage
}

type link struct{ Name, Address string }

type tab struct {
	Name, Address string
	Count         int
	Current       bool
}

type row struct {
	postgres.Review
	Address string
	Thumb   string // address of an image, or ""
}

var tabs = []struct {
	name   string
	state  schema.ReviewState
	states []schema.ReviewState
}{
	{"To do", "", []schema.ReviewState{schema.ReviewOpen, schema.ReviewAcknowledged}},
	{"Open", schema.ReviewOpen, []schema.ReviewState{schema.ReviewOpen}},
	{"Acknowledged", schema.ReviewAcknowledged, []schema.ReviewState{schema.ReviewAcknowledged}},
	{"Resolved", schema.ReviewResolved, []schema.ReviewState{schema.ReviewResolved}},
}

// queueParameters are the parameters of the queue's address: its filter, its order and the page.
var queueParameters = []string{
	"state", "model", "class", "assignee", "severity", "search", "order", "after", "before",
}

const queueRows = 30

func (p *Page) queue(w http.ResponseWriter, r *http.Request, reviewer string) error {
	return p.showQueue(w, r, reviewer, view{})
}

// showQueue renders the queue, with what was done or went wrong on the way there.
func (p *Page) showQueue(w http.ResponseWriter, r *http.Request, reviewer string, v view) error {
	ctx, q := r.Context(), r.URL.Query()
	at, last := q.Get("at"), q.Get("last")
	q = with(q, "at", "", "last", "")
	filter, err := queueFilter(q)
	if err != nil {
		return err
	}
	c := queuePage{Filter: q, Narrowed: filter.Severity != ""}
	if err := p.fillRows(ctx, &c, filter, at); err != nil {
		return err
	}
	c.Here = "/?" + c.Filter.Encode()
	c.CSV = "/queue.csv?" + with(c.Filter, "after", "", "before", "").Encode()
	if c.Classes, err = p.store.ReviewClasses(ctx); err != nil {
		return err
	}
	c.Models = models(c.Classes)
	if c.Evidence, err = p.store.EvidenceStats(ctx); err != nil {
		return err
	}
	if c.Notices, err = p.notices(r, filter); err != nil {
		return err
	}
	if c.Undo, err = p.undoOf(ctx, sitting{queue: c.Filter, in: true, last: last}); err != nil {
		return err
	}
	status := http.StatusOK
	if v.Error != "" {
		status = http.StatusConflict
	}
	v.Title, v.Reviewer, v.Content = "Queue", reviewer, c
	p.render(w, r, status, "queue", v)
	return nil
}

// fillRows reads one page of the queue: the one that the filter names, or if at is not on it, the one that begins with
// at. If at has left the queue, its successor takes its place.
func (p *Page) fillRows(ctx context.Context, c *queuePage, filter postgres.ReviewFilter, at string) error {
	counts, err := p.store.ReviewCounts(ctx, filter)
	if err != nil {
		return err
	}
	for _, t := range tabs {
		n := 0
		for _, state := range t.states {
			n += counts[state]
		}
		address := "/?" + with(c.Filter, "state", string(t.state), "after", "", "before", "").Encode()
		c.Tabs = append(c.Tabs, tab{t.name, address, n, c.Filter.Get("state") == string(t.state)})
	}
	filter.Limit = queueRows
	reviews, err := p.store.Reviews(ctx, filter)
	if err != nil {
		return err
	}
	if filter.Before != nil && len(reviews) < queueRows { // the first page
		filter.Before = nil
		c.Filter.Del("before")
		if reviews, err = p.store.Reviews(ctx, filter); err != nil {
			return err
		}
	}
	if at != "" {
		if reviews, err = p.pageOf(ctx, c, filter, at, reviews); err != nil {
			return err
		}
	}
	if len(reviews) == 0 {
		return nil
	}
	return p.addRows(ctx, c, filter, reviews)
}

// pageOf chooses the row of a review, or of its successor, and returns the page that it is on.
func (p *Page) pageOf(
	ctx context.Context, c *queuePage, filter postgres.ReviewFilter, at string, reviews []postgres.Review,
) ([]postgres.Review, error) {
	pos, err := p.store.ReviewPosition(ctx, filter, at)
	if errors.Is(err, postgres.ErrNotFound) {
		return reviews, nil
	}
	if err != nil {
		return nil, err
	}
	filter.After, filter.Before = &pos.Place, nil
	switch {
	case pos.Listed:
		c.Chosen, filter.After = at, &postgres.ReviewPlace{Key: pos.Place.Key} // before all ids of this key
	case pos.Next != "":
		c.Chosen = pos.Next
	case pos.Previous != "":
		c.Chosen, filter.After, filter.Before = pos.Previous, nil, &pos.Place
	default:
		return reviews, nil
	}
	if slices.ContainsFunc(reviews, func(r postgres.Review) bool { return r.ID == c.Chosen }) {
		return reviews, nil
	}
	c.Filter = with(c.Filter, "after", place(filter.After), "before", place(filter.Before))
	return p.store.Reviews(ctx, filter)
}

// pageNames are the names of the page before and after, by order.
var pageNames = map[postgres.ReviewOrder][2]string{
	postgres.ReviewNewest: {"Newer", "Older"}, postgres.ReviewOldest: {"Older", "Newer"},
}

func (p *Page) addRows(
	ctx context.Context, c *queuePage, filter postgres.ReviewFilter, reviews []postgres.Review,
) error {
	first, last := reviews[0], reviews[len(reviews)-1]
	pos, err := p.store.ReviewPosition(ctx, filter, first.ID)
	if err != nil {
		return err
	}
	names, ok := pageNames[cmp.Or(filter.Order, postgres.ReviewNewest)]
	if !ok {
		names = [2]string{"Higher", "Lower"}
	}
	total := pos.Before + 1 + pos.After
	c.Range = fmt.Sprintf("%d to %d of %d", pos.Before+1, pos.Before+len(reviews), total)
	if pos.Before > 0 {
		c.Previous = link{names[0], "/?" + with(c.Filter, "before", place(&first.Place), "after", "").Encode()}
	}
	if pos.Before+len(reviews) < total {
		c.Next = link{names[1], "/?" + with(c.Filter, "after", place(&last.Place), "before", "").Encode()}
	}
	s := sitting{queue: c.Filter, in: true}
	for _, v := range reviews {
		one := row{Review: Unmarked(v), Address: s.address(v.ID)}
		if v.Evidence == postgres.EvidenceDone {
			one.Thumb = "/review/" + url.PathEscape(v.ID) + "/evidence/image-0"
		}
		c.Rows = append(c.Rows, one)
	}
	return nil
}

// queueFilter reads the filter, the order and the page of the queue.
func queueFilter(q url.Values) (postgres.ReviewFilter, error) {
	f := postgres.ReviewFilter{Model: q.Get("model"), Assignee: q.Get("assignee"),
		Severity: schema.Severity(q.Get("severity")), Search: strings.TrimSpace(q.Get("search")),
		Order: postgres.ReviewOrder(q.Get("order"))}
	found := false
	for _, t := range tabs {
		if string(t.state) == q.Get("state") {
			f.States, found = t.states, true
		}
	}
	if !found {
		return f, fmt.Errorf("%w: state: there is no state %q", errForm, q.Get("state"))
	}
	if f.Severity != "" && !slices.Contains(schema.Severities(), f.Severity) {
		return f, fmt.Errorf("%w: severity: there is no severity %q", errForm, f.Severity)
	}
	if f.Order != "" && !slices.Contains(postgres.ReviewOrders(), f.Order) {
		return f, fmt.Errorf("%w: order: there is no order %q", errForm, f.Order)
	}
	if s := q.Get("class"); s != "" { // model/index
		model, index, ok := strings.Cut(s, "/")
		i, err := strconv.Atoi(index)
		if !ok || err != nil || i < 0 || i > maxInteger {
			return f, fmt.Errorf("%w: class: there is no class %q", errForm, s)
		}
		if f.Model != "" && f.Model != model {
			return f, fmt.Errorf("%w: the class %q is not one of %s", errForm, s, f.Model)
		}
		f.Model, f.Class = model, &i
	}
	var err error
	if f.After, err = readPlace("after", q.Get("after")); err != nil {
		return f, err
	}
	if f.Before, err = readPlace("before", q.Get("before")); err != nil {
		return f, err
	}
	if f.After != nil && f.Before != nil {
		return f, fmt.Errorf("%w: after and before must not both be given", errForm)
	}
	return f, nil
}

// place returns a place as it stands in an address.
func place(p *postgres.ReviewPlace) string {
	if p == nil {
		return ""
	}
	return p.Key + " " + p.ID
}

func readPlace(name, text string) (*postgres.ReviewPlace, error) {
	if text == "" {
		return nil, nil
	}
	key, id, ok := strings.Cut(text, " ")
	number, err := strconv.ParseFloat(key, 64)
	if !ok || err != nil || number != number || strings.ContainsAny(key, "xXpP_iI") {
		return nil, fmt.Errorf("%w: %s: there is no place %q", errForm, name, text)
	}
	return &postgres.ReviewPlace{Key: key, ID: id}, nil
}

// with returns values with some of them replaced.
func with(q url.Values, pairs ...string) url.Values {
	c := maps.Clone(q)
	for i := 0; i < len(pairs); i += 2 {
		c.Del(pairs[i])
		if pairs[i+1] != "" {
			c.Set(pairs[i], pairs[i+1])
		}
	}
	return c
}

// bulk makes one change on each of the reviews that were picked, if its version is the one that was picked.
func (p *Page) bulk(w http.ResponseWriter, r *http.Request, reviewer string) error {
	change := changeOf(r.PostForm, reviewer)
	picked := r.PostForm["pick"]
	if len(picked) == 0 {
		return p.showQueue(w, r, reviewer, view{Error: "Nothing is selected, so nothing was changed."})
	}
	changed, failed := 0, []string{}
	for _, pick := range picked {
		id, version, _ := strings.Cut(pick, " ")
		var err error
		if change.Version, err = readVersion(version); err != nil {
			return err
		}
		_, err = change.Apply(r.Context(), p.store, id)
		switch {
		case err == nil:
			changed++
		case errors.Is(err, ErrRefused), errors.Is(err, ErrConflict), errors.Is(err, postgres.ErrNotFound):
			failed = append(failed, sentence(err))
		default:
			return err
		}
	}
	v := view{Note: fmt.Sprintf("Changed %d of %d reviews.", changed, len(picked))}
	if len(failed) > 0 {
		v.Error = strings.Join(failed, " ")
	}
	return p.showQueue(w, r, reviewer, v)
}

// export writes the filtered queue as CSV.
func (p *Page) export(w http.ResponseWriter, r *http.Request, _ string) error {
	filter, err := queueFilter(r.URL.Query())
	if err != nil {
		return err
	}
	filter.Limit = 1000
	page, err := p.store.Reviews(r.Context(), filter)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/csv; charset=utf-8")
	w.Header().Set("Content-Disposition", `attachment; filename="decuwatch-queue.csv"`)
	out := csv.NewWriter(w)
	_ = out.Write(csvHeader) // out.Error says whether the visitor has gone
	for len(page) > 0 && out.Error() == nil {
		for _, v := range page {
			_ = out.Write(csvRow(Unmarked(v)))
		}
		out.Flush()
		filter.After = &page[len(page)-1].Place
		if page, err = p.store.Reviews(r.Context(), filter); err != nil {
			p.config.Log.Error("review page", "path", r.URL.Path, "err", err)
			panic(http.ErrAbortHandler) // a file that ends early must not look whole
		}
	}
	out.Flush()
	return nil
}

var csvHeader = []string{
	"review", "state", "verdict", "model", "class_index", "class_label", "source", "event_id", "event_time", "labels",
	"assignee", "opened_at", "resolved_at", "severity", "reason", "measurement", "alert",
}

func csvRow(v postgres.Review) []string {
	labels, _ := json.Marshal(v.Labels) // a map of strings
	resolved := ""
	if v.ResolvedAt != nil {
		resolved = v.ResolvedAt.UTC().Format(time.RFC3339)
	}
	list := []string{
		v.ID, string(v.State), string(v.Verdict), v.Model, strconv.Itoa(v.ClassIndex), v.ClassLabel, v.Source, v.EventID,
		v.EventTime.UTC().Format(time.RFC3339), string(labels), v.Assignee, v.OpenedAt.UTC().Format(time.RFC3339), resolved,
		string(v.Severity), string(v.Reason), string(v.Measurement), v.AlertID,
	}
	for i, s := range list {
		if s != "" && strings.ContainsRune("=+-@\t\r", rune(s[0])) { // a spreadsheet would compute it
			list[i] = "'" + s
		}
	}
	return list
}
