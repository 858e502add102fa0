package schema

import (
	"net/netip"
	"regexp"
	"strings"
)

// uriPattern is the grammar of a URI-reference in RFC 3986, without IP addresses of a future version and without
// percent-encoding in host names. Its group is an IPv6 address. The JSON Schema repeats it without the group.
var uriPattern = func() *regexp.Regexp {
	const (
		char      = `[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2}`
		segment   = `(?:` + char + `)`
		first     = `(?:[A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{2})` // of a relative path: without a colon
		user      = `(?:(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@)?`
		host      = `(?:\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\]|[A-Za-z0-9._~!$&'()*+,;=-]*)`
		authority = user + host + `(?::[0-9]*)?`
		segments  = `(?:/` + segment + `*)*`
		absolute  = `//` + authority + segments + `|/(?:` + segment + `+` + segments + `)?`
		tail      = `(?:` + char + `|[/?])*`
	)
	return regexp.MustCompile(`^(?:` +
		`[A-Za-z][A-Za-z0-9+.-]*:(?:` + absolute + `|` + segment + `+` + segments + `)?|` +
		`(?:` + absolute + `|` + first + `+` + segments + `)?` +
		`)(?:\?` + tail + `)?(?:#` + tail + `)?$`)
}()

func isURIReference(s string) bool {
	m := uriPattern.FindStringSubmatch(s)
	if m == nil {
		return false
	}
	if literal := strings.Join(m[1:], ""); literal != "" {
		_, err := netip.ParseAddr(literal)
		return err == nil
	}
	return true
}
