package review

import (
	"errors"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/decuwatch/decuwatch/schema/postgres"
)

// errForm is the error of a request with a parameter that is malformed; the text names it.
var errForm = errors.New("the request is not valid")

// Bounds of a request.
const (
	maxForm      = 64 << 10 // bytes of a form
	maxParameter = 4096     // bytes of a parameter that is not a comment
	maxInteger   = 1<<31 - 1
)

// parameters are the names that a route takes in its query and in its form.
type parameters struct {
	query, form []string
	many        []string // names in the form that may be given several times
	any         bool     // nothing is looked at: there is no such page
}

// check reads the request's form and returns an error that names the first parameter which is unknown, given twice or
// not text.
func (p parameters) check(w http.ResponseWriter, r *http.Request) error {
	if p.any {
		return nil
	}
	for _, name := range []string{"id", "name"} {
		if checkText(name, r.PathValue(name)) != nil {
			return fmt.Errorf("%s %q: %w", name, r.PathValue(name), postgres.ErrNotFound)
		}
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return fmt.Errorf("%w: the query: %w", errForm, err)
	}
	if err := checkValues(query, p.query, nil); err != nil || r.Method != http.MethodPost {
		return err
	}
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil ||
		kind != "application/x-www-form-urlencoded" {
		return fmt.Errorf("%w: Content-Type is %q, must be application/x-www-form-urlencoded", errForm,
			r.Header.Get("Content-Type"))
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	var large *http.MaxBytesError
	if err := r.ParseForm(); errors.As(err, &large) {
		return err
	} else if err != nil {
		return fmt.Errorf("%w: the form: %w", errForm, err)
	}
	return checkValues(r.PostForm, p.form, p.many)
}

func checkValues(values url.Values, known, many []string) error {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		list := values[name]
		repeats := slices.Contains(many, name)
		switch {
		case !repeats && !slices.Contains(known, name):
			return fmt.Errorf("%w: there is no parameter %q here", errForm, name)
		case !repeats && len(list) > 1:
			return fmt.Errorf("%w: %s is given %d times", errForm, name, len(list))
		}
		for _, value := range list {
			if err := checkText(name, value); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkText(name, value string) error {
	comment := name == "comment"
	switch {
	case !utf8.ValidString(value):
		return fmt.Errorf("%w: %s is not UTF-8", errForm, name)
	case strings.ContainsFunc(value, func(r rune) bool {
		return unicode.IsControl(r) &&
			!(comment && strings.ContainsRune("\r\n\t", r))
	}):
		return fmt.Errorf("%w: %s is %q, which holds a control character", errForm, name, value)
	case !comment && len(value) > maxParameter:
		return fmt.Errorf("%w: %s has %d bytes, the most is %d", errForm, name, len(value), maxParameter)
	}
	return nil
}

// single returns an error that names the first header which decides something and is given more than once: which of two
// a proxy has checked is not known.
func (a *access) single(r *http.Request) error {
	for _, name := range []string{a.Header, "Authorization", "Origin", "Sec-Fetch-Site", "Content-Type", "HX-Request"} {
		if n := len(r.Header.Values(name)); name != "" && n > 1 {
			return fmt.Errorf("%w: the header %s is given %d times", errForm, name, n)
		}
	}
	if n := len(r.CookiesNamed(cookieName)); n > 1 {
		return fmt.Errorf("%w: the cookie %s is given %d times", errForm, cookieName, n)
	}
	return nil
}
