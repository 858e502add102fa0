package schema

import (
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const maxReasonValue = 48 // bytes of an offending value that a reason repeats

func printable(s string) bool {
	unfit := func(r rune) bool { return unicode.IsControl(r) || noncharacter(r) }
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unfit)
}

// noncharacter reports whether Unicode reserves a code point for use inside programs.
func noncharacter(r rune) bool { return r >= 0xfdd0 && r <= 0xfdef || r&0xfffe == 0xfffe }

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII })
}

// clip makes a producer's text fit for a reason: short, and without control characters.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
	if len(s) <= maxReasonValue {
		return s
	}
	cut := maxReasonValue
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "..."
}

// pathName writes a producer's field name as part of a path.
func pathName(s string) string {
	if s == "" {
		return `""`
	}
	return clip(s)
}

func quote(s string) string { return strconv.Quote(clip(s)) }

func sortedNames[V any](m map[string]V) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
