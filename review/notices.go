package review

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Notices that a reviewer has dismissed are in a cookie: each reviewer dismisses for themselves.
const (
	dismissedCookie = "decuwatch_dismissed"
	dismissedFor    = 24 * time.Hour // notices are shown for a day
	maxNotices      = 20
)

// notices returns the alerts of the last day that are about no single score, as far as the filter of the queue lets
// them through and the visitor has not dismissed them.
func (p *Page) notices(r *http.Request, filter postgres.ReviewFilter) ([]schema.Alert, error) {
	now, err := p.store.Now(r.Context())
	if err != nil {
		return nil, err
	}
	list, err := p.store.Alerts(r.Context(), postgres.AlertFilter{
		NotKind: schema.AlertScore, Model: filter.Model, Severity: filter.Severity, Since: now.Add(-dismissedFor),
		Limit: 10 * maxNotices,
	})
	if err != nil {
		return nil, err
	}
	hidden := dismissed(r)
	list = slices.DeleteFunc(list, func(a schema.Alert) bool {
		return slices.Contains(hidden, a.ID) || filter.Class != nil && a.ClassLabel != "" && a.ClassIndex != *filter.Class
	})
	return list[:min(len(list), maxNotices)], nil
}

func dismissed(r *http.Request) []string {
	cookie, err := r.Cookie(dismissedCookie)
	if err != nil {
		return nil
	}
	return strings.Split(cookie.Value, ".")
}

// dismiss hides one notice from the visitor.
func (p *Page) dismiss(w http.ResponseWriter, r *http.Request, _ string) error {
	id := r.PostForm.Get("id")
	if id == "" || len(id) > 64 || strings.ContainsFunc(id, func(c rune) bool {
		return !strings.ContainsRune("0123456789abcdef", c)
	}) {
		return fmt.Errorf("%w: id is %q, it names no notice", errForm, id)
	}
	list := append(dismissed(r), id)
	list = list[max(0, len(list)-2*maxNotices):]
	http.SetCookie(w, &http.Cookie{
		Name: dismissedCookie, Value: strings.Join(list, "."), Path: "/", MaxAge: int(dismissedFor.Seconds()),
		HttpOnly: true, Secure: p.access.secure, SameSite: http.SameSiteLaxMode,
	})
	redirect(w, r, target(r.PostForm.Get("to")))
	return nil
}
