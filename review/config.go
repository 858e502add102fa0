package review

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"

	"github.com/decuwatch/decuwatch/internal/settings"
)

// Config says what enters review beside alerts, how evidence is made, and who may see the page. Fields with a name are
// settings.
type Config struct {
	// Share of scores without an alert that enter review unmarked, so that recall can be estimated; 0 to 1.
	Share float64 `name:"share" default:"0.01" min:"0" max:"1"`
	// File with the token that reviewers log in with, at least 16 characters. Defaults to none.
	TokenFile string `name:"token-file" placeholder:"FILE"`
	// Header in which a proxy names the user that it has authenticated. Defaults to none.
	TrustedHeader string `name:"trusted-header" placeholder:"NAME"`
	// Addresses of proxies whose review.trusted-header is believed. Defaults to loopback.
	TrustedProxies []string `name:"trusted-proxies" placeholder:"CIDR"`
	// Address of the page as reviewers reach it from outside: https://review.example.com. Defaults to none.
	URL string `name:"url" placeholder:"URL"`
	WorkerConfig
}

// headerName is a token of RFC 9110.
var headerName = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")

// Check returns an error that names the settings out of their bounds.
func (c Config) Check() error {
	errs := []error{settings.Check("review", c), c.WorkerConfig.Check(), settings.WebAddress("review.url", c.URL)}
	if c.TokenFile != "" && c.TrustedHeader != "" {
		errs = append(errs, settings.Errorf("review.token-file and review.trusted-header must not both be given"))
	}
	if len(c.TrustedProxies) > 0 && c.TrustedHeader == "" {
		errs = append(errs, settings.Errorf("review.trusted-proxies is given without review.trusted-header"))
	}
	if c.TrustedHeader != "" && !headerName.MatchString(c.TrustedHeader) {
		errs = append(errs,
			settings.Errorf("review.trusted-header is %q, must be the name of a header", c.TrustedHeader))
	}
	_, err := c.proxies()
	return errors.Join(append(errs, err)...)
}

func (c Config) proxies() ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, s := range c.TrustedProxies {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			ip, err := netip.ParseAddr(s)
			if err != nil {
				return nil, settings.Errorf("review.trusted-proxies: %q is not an address or a CIDR", s)
			}
			p = netip.PrefixFrom(ip, ip.BitLen())
		}
		list = append(list, p)
	}
	return list, nil
}

// Access reads who may see the page.
func (c Config) Access() (Access, error) {
	a := Access{Header: c.TrustedHeader, URL: c.URL}
	var err error
	if a.Proxies, err = c.proxies(); err != nil || c.TokenFile == "" {
		return a, err
	}
	token, err := os.ReadFile(c.TokenFile)
	if err != nil {
		return a, fmt.Errorf("review.token-file: %w", err)
	}
	if a.Token = strings.TrimSpace(string(token)); a.Token == "" {
		return a, settings.Errorf("review.token-file: %s is empty", c.TokenFile)
	}
	return a, nil
}
