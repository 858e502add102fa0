package review

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// sitting is what a reviewer works through: a filtered queue, and how far. It travels in the addresses of reviews.
type sitting struct {
	in     bool                  // the review was opened from the queue
	queue  url.Values            // the queue's parameters
	filter postgres.ReviewFilter // of the queue, on all its pages
	done   int                   // verdicts so far
	last   string                // id of the review that got the last verdict, or ""
}

// readSitting reads a sitting from the address of a review.
func readSitting(q url.Values) (s sitting, err error) {
	if s.in = q.Has("in"); !s.in {
		return s, nil
	}
	if s.queue, err = url.ParseQuery(q.Get("in")); err != nil {
		return s, fmt.Errorf("%w: in: %w", errForm, err)
	}
	if err = checkValues(s.queue, queueParameters, nil); err != nil {
		return s, err
	}
	if s.filter, err = queueFilter(s.queue); err != nil {
		return s, err
	}
	s.filter.After, s.filter.Before = nil, nil
	if text := q.Get("done"); text != "" {
		if s.done, err = strconv.Atoi(text); err != nil || s.done < 0 || s.done > maxInteger {
			return s, fmt.Errorf("%w: done is %q, must be a number of verdicts", errForm, text)
		}
	}
	s.last = q.Get("last")
	return s, nil
}

// address returns the address of a review in the sitting.
func (s sitting) address(id string) string {
	address := "/review/" + url.PathEscape(id)
	if !s.in {
		return address
	}
	q := url.Values{"in": {s.queue.Encode()}}
	if s.done > 0 {
		q.Set("done", strconv.Itoa(s.done))
	}
	if s.last != "" {
		q.Set("last", s.last)
	}
	return address + "?" + q.Encode()
}

// back returns the address of the queue with a review's row chosen.
func (s sitting) back(id string) string {
	if !s.in {
		return "/"
	}
	return "/?" + with(s.queue, "at", id, "last", s.last).Encode()
}

// visitPage is where a review stands in its sitting, as it is shown.
type visitPage struct {
	Here, Back     string // addresses
	Previous, Next string // addresses, or ""
	Number, Total  int    // "23 of 60"; 0 outside a sitting
	Undo           *undoPage
}

// undoPage is the last verdict of a sitting, which can be taken back.
type undoPage struct {
	postgres.Review
	Address string
}

// visit returns where a review stands in a sitting.
func (p *Page) visit(ctx context.Context, s sitting, id string) (visitPage, error) {
	v := visitPage{Here: s.address(id), Back: s.back(id)}
	if !s.in {
		return v, nil
	}
	pos, err := p.store.ReviewPosition(ctx, s.filter, id)
	if err != nil {
		return v, err
	}
	v.Number, v.Total = s.done+pos.Before+1, s.done+pos.Before+1+pos.After
	moved := s
	moved.last = ""
	if pos.Previous != "" {
		v.Previous = moved.address(pos.Previous)
	}
	if pos.Next != "" {
		v.Next = moved.address(pos.Next)
	}
	v.Undo, err = p.undoOf(ctx, s)
	return v, err
}

// undoOf returns the last verdict of a sitting, or nil if there is none or it was taken back.
func (p *Page) undoOf(ctx context.Context, s sitting) (*undoPage, error) {
	if s.last == "" {
		return nil, nil
	}
	v, err := p.store.ReviewByID(ctx, s.last)
	if errors.Is(err, postgres.ErrNotFound) || errors.Is(err, postgres.ErrAmbiguous) ||
		err == nil && v.State != schema.ReviewResolved {
		return nil, nil
	}
	s.done, s.last = max(0, s.done-1), ""
	return &undoPage{v, s.address(v.ID)}, err
}

// next returns where a verdict leads: to the next review of the queue, or back to the queue after its last one.
func (p *Page) next(ctx context.Context, s sitting, id string) (string, error) {
	pos, err := p.store.ReviewPosition(ctx, s.filter, id)
	if err != nil {
		return "", err
	}
	s.done++
	s.last = id
	if pos.Next == "" {
		return s.back(id), nil
	}
	return s.address(pos.Next), nil
}
