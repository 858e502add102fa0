package app

import (
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// A page that other machines reach does not start without authentication.
func TestReviewPageNeedsAuthentication(t *testing.T) {
	token := t.TempDir() + "/token"
	if err := os.WriteFile(token, []byte("0123456789abcdef0123\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	store := pgtest.New(t)
	open := func(c ReviewConfig) (address string, err error) {
		if err := c.Check(); err != nil {
			return "", err
		}
		life, _ := NewLifecycle(t.Context(), slog.New(slog.DiscardHandler))
		t.Cleanup(func() { life.End(new(error)) })
		return servePage(c, store, nil, slog.New(slog.DiscardHandler), life)
	}
	valid := DefaultConfig().Review
	valid.Workers, valid.Address = 0, "0.0.0.0:0"
	for name, change := range map[string]func(*ReviewConfig){
		"takes a token": func(*ReviewConfig) {},
		"must not both": func(c *ReviewConfig) { c.TokenFile, c.TrustedHeader = token, "X-User" },
		"is not an address": func(c *ReviewConfig) {
			c.TrustedHeader, c.TrustedProxies = "X-User", []string{"proxy"}
		},
		"must be host:port":       func(c *ReviewConfig) { c.Address = "8080" },
		"must be http://host":     func(c *ReviewConfig) { c.URL = "review" },
		"review.image-side is 4":  func(c *ReviewConfig) { c.ImageSide = 4 },
		"review.workers is -1":    func(c *ReviewConfig) { c.Workers = -1 },
		"no such file":            func(c *ReviewConfig) { c.TokenFile = token + "-missing" },
		"review.evidence-attempt": func(c *ReviewConfig) { c.MaxAttempts = 0 },
	} {
		c := valid
		change(&c)
		if _, err := open(c); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v, want an error that says %q", err, name)
		}
	}
	c := valid
	c.TokenFile = token
	address, err := open(c)
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := strings.Cut(address, "]:")
	var wg sync.WaitGroup
	for bearer, want := range map[string]int{
		"0123456789abcdef0123": http.StatusOK, "": http.StatusUnauthorized, "wrong": http.StatusUnauthorized,
	} {
		wg.Go(func() {
			request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+port+"/", nil)
			if err != nil {
				t.Error(err)
				return
			}
			request.Header.Set("Authorization", "Bearer "+bearer)
			response, err := http.DefaultClient.Do(request)
			if err != nil {
				t.Error(err)
				return
			}
			response.Body.Close()
			if response.StatusCode != want {
				t.Errorf("token %q: %s, want %d", bearer, response.Status, want)
			}
		})
	}
	wg.Wait()
}
