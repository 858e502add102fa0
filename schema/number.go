package schema

import (
	"cmp"
	"encoding/json"
	"strconv"
	"strings"
)

// decimal is the exact value of a JSON number: 0.digits times ten to the power of point. Digits neither begin nor end
// with a zero, so that each value has one form; the zero value is 0.
type decimal struct {
	negative bool
	digits   string
	point    int
}

// maxExponent bounds exponents. A payload has too few digits to reach it.
const maxExponent = 1 << 30

func newDecimal(n json.Number) decimal {
	mantissa, exponent, _ := strings.Cut(strings.ToLower(n.String()), "e")
	mantissa, negative := strings.CutPrefix(mantissa, "-")
	whole, fraction, _ := strings.Cut(mantissa, ".")
	shift, _ := strconv.ParseInt(exponent, 10, 64) // 0 without an exponent; the nearest int64 for one out of range
	all := whole + fraction
	digits := strings.TrimLeft(all, "0")
	if digits == "" {
		return decimal{}
	}
	point := len(whole) - (len(all) - len(digits)) + int(min(max(shift, -maxExponent), maxExponent))
	return decimal{negative: negative, digits: strings.TrimRight(digits, "0"), point: point}
}

func (d decimal) isInteger() bool { return d.point >= len(d.digits) }

// sign is -1, 0 or 1.
func (d decimal) sign() int {
	switch {
	case d.digits == "":
		return 0
	case d.negative:
		return -1
	}
	return 1
}

func (d decimal) compare(other decimal) int {
	size := cmp.Or(cmp.Compare(d.point, other.point), cmp.Compare(d.digits, other.digits))
	return cmp.Or(cmp.Compare(d.sign(), other.sign()), size*d.sign())
}

func (d decimal) within(least, most json.Number) bool {
	return d.compare(newDecimal(least)) >= 0 && d.compare(newDecimal(most)) <= 0
}

// integer returns the size of a number that is an integer within the bounds, however it is written: 50, 50.0, 5e1. The
// bounds must fit 64 bits.
func integer(n json.Number, at string, least, most json.Number) (uint64, error) {
	d := newDecimal(n)
	if !d.isInteger() || !d.within(least, most) {
		return 0, invalid(at, "%s must be an integer from %s to %s", clip(n.String()), least, most)
	}
	return strconv.ParseUint("0"+d.digits+strings.Repeat("0", d.point-len(d.digits)), 10, 64)
}

// real returns the float64 nearest to a number within the bounds.
func real(n json.Number, at string, least, most json.Number) (float64, error) {
	if !newDecimal(n).within(least, most) {
		return 0, invalid(at, "%s must be a number from %s to %s", clip(n.String()), least, most)
	}
	f, err := strconv.ParseFloat(n.String(), 64)
	return f + 0, err // -0 becomes 0
}
