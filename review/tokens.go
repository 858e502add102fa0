package review

import (
	"errors"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"golang.org/x/time/rate"
)

// An address may give wrongTokens wrong tokens at once, and one more each wrongTokenEvery. After that its tokens are
// not looked at, right or wrong.
const (
	wrongTokens     = 10
	wrongTokenEvery = 6 * time.Second
	maxAddresses    = 4096 // that are told apart
)

var (
	errWrongToken = errors.New("that is not the token")
	errSlowed     = errors.New("too many wrong tokens came from this address; wait")
)

// tokens checks tokens, counts them, and slows down who guesses.
type tokens struct {
	is      func(string) bool
	checked *prometheus.CounterVec

	mu        sync.Mutex
	addresses map[netip.Prefix]*rate.Limiter // the zero prefix stands for those beyond maxAddresses
}

func newTokens(is func(string) bool, reg prometheus.Registerer) *tokens {
	checked := promauto.With(reg).NewCounterVec(prometheus.CounterOpts{
		Name: "decuwatch_review_tokens_total",
		Help: "Tokens given to the review page: right, wrong, or slowed: not looked at after too many wrong ones.",
	}, []string{"outcome"})
	t := &tokens{is: is, addresses: map[netip.Prefix]*rate.Limiter{}, checked: checked}
	for _, outcome := range []string{"right", "wrong", "slowed"} {
		t.checked.WithLabelValues(outcome)
	}
	return t
}

// check returns nil if token is right, else errWrongToken or errSlowed.
func (t *tokens) check(r *http.Request, token string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	limiter := t.of(r.RemoteAddr)
	outcome, err := "right", error(nil)
	switch {
	case limiter.Tokens() < 1:
		outcome, err = "slowed", errSlowed
	case !t.is(token):
		limiter.Allow()
		outcome, err = "wrong", errWrongToken
	}
	t.checked.WithLabelValues(outcome).Inc()
	return err
}

// of returns the limiter of an address: of a network of 64 bits for IPv6. The caller holds the mutex.
func (t *tokens) of(remote string) *rate.Limiter {
	var key netip.Prefix
	if peer, err := netip.ParseAddrPort(remote); err == nil {
		ip, bits := peer.Addr().Unmap(), 32
		if ip.Is6() {
			bits = 64
		}
		key = netip.PrefixFrom(ip.WithZone(""), bits).Masked()
	}
	if l := t.addresses[key]; l != nil {
		return l
	}
	if len(t.addresses) >= maxAddresses {
		for known, l := range t.addresses {
			if l.Tokens() >= wrongTokens { // as good as new
				delete(t.addresses, known)
			}
		}
	}
	if len(t.addresses) >= maxAddresses {
		key = netip.Prefix{}
	}
	l := t.addresses[key]
	if l == nil {
		l = rate.NewLimiter(rate.Every(wrongTokenEvery), wrongTokens)
		t.addresses[key] = l
	}
	return l
}
