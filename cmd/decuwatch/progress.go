package main

import (
	"fmt"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progressLines shows how far a long verb is, on stderr: a bar on a terminal, else a line now and then.
type progressLines struct {
	s           *streams
	what        string
	bar         *progressbar.ProgressBar
	began, last time.Time
	done, total int
}

const lineEvery = 10 * time.Second

func newProgressLines(s *streams, what string) *progressLines {
	return &progressLines{s: s, what: what, began: time.Now()}
}

// at shows that done of total are done.
func (p *progressLines) at(done, total int) {
	first := p.total == 0
	p.done, p.total = done, total
	if p.s.progress {
		if p.bar == nil {
			p.bar = progress(p.s, total, p.what)
		}
		p.bar.ChangeMax(total)
		_ = p.bar.Set(done) // it only draws
		return
	}
	if first || time.Since(p.last) >= lineEvery {
		p.line()
	}
}

// end shows the last state.
func (p *progressLines) end() {
	switch {
	case p.bar != nil:
		_ = p.bar.Exit()
	case p.total > 0:
		p.line()
	}
}

func (p *progressLines) line() {
	p.last = time.Now()
	left := ""
	if took := time.Since(p.began); p.done > 0 && p.done < p.total {
		left = fmt.Sprintf(", about %s left", rounded(took*time.Duration(p.total-p.done)/time.Duration(p.done)))
	}
	fmt.Fprintf(p.s.err, "%s: %d of %d events (%d%%)%s\n", p.what, p.done, p.total, 100*p.done/p.total, left)
}
