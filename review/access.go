package review

import (
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Access says who may see the page, and how a reviewer is known. With neither Token nor Header the page is for this
// machine alone: it answers on loopback only, and every visitor is trusted.
type Access struct {
	// Token is asked for once in the browser, with a name, and then kept in a signed cookie; programs send it as
	// "Authorization: Bearer". At least 16 characters. Defaults to none.
	Token string
	// Header is the header in which a proxy names the user that it has authenticated. Defaults to none.
	Header string
	// Proxies are the addresses whose Header is believed. Defaults to loopback.
	Proxies []netip.Prefix
	// Reviewer is the name of a visitor who gave no name, if the page is for this machine alone. Defaults to "local".
	Reviewer string
	// URL is where the page is reached from outside: its host is answered to beside the address of the listener, and
	// cookies travel over TLS only if it starts with https. Defaults to none.
	URL string
	// TLS says that the listener itself speaks TLS: cookies travel over nothing else.
	TLS bool
}

const (
	cookieName = "decuwatch_review"
	sessionAge = 12 * time.Hour
	minToken   = 16
)

// access is a checked Access.
type access struct {
	Access
	key    []byte // signs cookies
	host   string // of URL
	secure bool   // cookies over TLS only
	tokens *tokens
}

// newAccess checks an Access against the address that is listened on.
func newAccess(a Access, address net.Addr, reg prometheus.Registerer) (*access, error) {
	if a.Reviewer == "" {
		a.Reviewer = "local"
	}
	if a.Token != "" && len(a.Token) < minToken {
		return nil, fmt.Errorf("review: the token has %d characters, must have at least %d", len(a.Token), minToken)
	}
	if a.Token == "" && a.Header == "" {
		if tcp, ok := address.(*net.TCPAddr); !ok || !tcp.IP.IsLoopback() {
			return nil, fmt.Errorf("review: %s can be reached from other machines, which takes a token or a trusted proxy's "+
				"header", address)
		}
	}
	if a.Header != "" && len(a.Proxies) == 0 {
		a.Proxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	}
	if err := checkName(a.Reviewer); err != nil {
		return nil, fmt.Errorf("review: the reviewer's name %w", err)
	}
	c := &access{Access: a, key: make([]byte, 32), secure: a.TLS}
	c.tokens = newTokens(c.isToken, reg)
	if a.URL != "" {
		u, err := url.Parse(a.URL)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, fmt.Errorf("review: the page's address %q must be http://host or https://host", a.URL)
		}
		c.host, c.secure = u.Host, a.TLS || u.Scheme == "https"
	}
	if a.Token != "" { // the same in every process that knows the token, and after a restart
		mac := hmac.New(sha256.New, []byte(a.Token))
		mac.Write([]byte("decuwatch review session"))
		c.key = mac.Sum(nil)
	} else if _, err := rand.Read(c.key); err != nil {
		return nil, err
	}
	return c, nil
}

var (
	errNoSession = errors.New("nobody is logged in")
	errNoHeader  = errors.New("the proxy in front of this page named no user")
	errProxy     = errors.New("this page is reached through its proxy only")
	errHost      = errors.New("this page is not known under that name")
)

// checkHeader returns an error unless value is one name. A proxy that adds its header to one that a visitor sent may
// join the two by a comma.
func (a *access) checkHeader(value string) error {
	if strings.Contains(value, ",") {
		return fmt.Errorf("%w: the header %s is %q: a comma joins headers, and which of them the proxy has checked is not "+
			"known", errForm, a.Header, value)
	}
	return checkName(value)
}

// who returns the reviewer's name.
func (a *access) who(r *http.Request) (string, error) {
	if a.Header != "" {
		peer, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil || !contains(a.Proxies, peer.Addr().Unmap()) {
			return "", errProxy
		}
		name := strings.TrimSpace(r.Header.Get(a.Header))
		if name == "" {
			return "", errNoHeader
		}
		return name, a.checkHeader(name)
	}
	name, signed := a.session(r)
	if a.Token == "" {
		// A page of another site that resolves to this machine must not read along.
		if !a.local(r.Host) {
			return "", errHost
		}
		return cmp.Or(name, a.Reviewer), nil
	}
	if signed {
		return name, nil
	}
	if bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return "token", a.tokens.check(r, bearer)
	}
	return "", errNoSession
}

func (a *access) isToken(s string) bool {
	have, want := sha256.Sum256([]byte(s)), sha256.Sum256([]byte(a.Token))
	return a.Token != "" && subtle.ConstantTimeCompare(have[:], want[:]) == 1
}

// local reports whether a Host header names this machine, or the page's own address.
func (a *access) local(host string) bool {
	if host == a.host && host != "" {
		return true
	}
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	if name == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(strings.Trim(name, "[]"))
	return err == nil && ip.IsLoopback()
}

func contains(prefixes []netip.Prefix, ip netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}

// session reads the name in the cookie, and whether its signature is ours and young enough.
func (a *access) session(r *http.Request) (string, bool) {
	cookie, err := r.Cookie(cookieName)
	if err != nil {
		return "", false
	}
	parts := strings.Split(cookie.Value, ".")
	if len(parts) != 3 || !hmac.Equal([]byte(parts[2]), []byte(a.sign(parts[0], parts[1]))) {
		return "", false
	}
	end, err := strconv.ParseInt(parts[1], 10, 64)
	name, err2 := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil || err2 != nil || time.Now().Unix() > end || checkName(string(name)) != nil {
		return "", false
	}
	return string(name), true
}

func (a *access) sign(name, end string) string {
	mac := hmac.New(sha256.New, a.key)
	mac.Write([]byte(name + "." + end))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// cookie returns the cookie of a session; an empty name ends it.
func (a *access) cookie(name string) *http.Cookie {
	c := &http.Cookie{Name: cookieName, Path: "/", HttpOnly: true, Secure: a.secure, SameSite: http.SameSiteLaxMode}
	if name == "" {
		c.MaxAge = -1
		return c
	}
	encoded := base64.RawURLEncoding.EncodeToString([]byte(name))
	end := strconv.FormatInt(time.Now().Add(sessionAge).Unix(), 10)
	c.Value, c.MaxAge = encoded+"."+end+"."+a.sign(encoded, end), int(sessionAge.Seconds())
	return c
}

// secured wraps a handler in what every answer carries, and refuses writes that another site's page caused.
func secured(next http.Handler) http.Handler {
	guarded := http.NewCrossOriginProtection().Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy",
			"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action "+
				"'self'; base-uri 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), microphone=(), geolocation=()")
		h.Set("Cache-Control", "no-store")
		guarded.ServeHTTP(w, r)
	})
}
