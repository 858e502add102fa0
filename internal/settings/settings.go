// Package settings gives groups of settings their defaults and bounds, which stand in the tags of a struct's fields.
//
// A field that is a setting has the tag name, and its comment is its documentation. The tag default is the value of a
// zero field, and min, max and oneof are the bounds. Fields that only Go code sets have the tag kong:"-" beside
// these.
package settings

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Error is an error in a setting, a flag or an argument: the user can fix it, and retrying will not help.
type Error struct{ Err error }

func (e Error) Error() string { return e.Err.Error() }
func (e Error) Unwrap() error { return e.Err }

// Errorf returns an [Error] with the formatted text, which names the setting.
func Errorf(format string, args ...any) error { return Error{fmt.Errorf(format, args...)} }

// WithDefaults returns c with the default of its tag in each field that is zero.
func WithDefaults[T any](c T) T {
	v := reflect.ValueOf(&c).Elem()
	for _, f := range reflect.VisibleFields(v.Type()) {
		if text, ok := f.Tag.Lookup("default"); ok && v.FieldByIndex(f.Index).IsZero() {
			v.FieldByIndex(f.Index).Set(parse(f.Type, text))
		}
	}
	return c
}

// Check returns an error that names each field of c that is out of its bounds, as group.name. It skips the fields of
// embedded structs, which their owners check, and zero fields that only Go code sets.
func Check(group string, c any) error {
	var errs []error
	v := reflect.ValueOf(c)
	for _, f := range reflect.VisibleFields(v.Type()) {
		if len(f.Index) > 1 || f.Tag.Get("kong") == "-" && v.FieldByIndex(f.Index).IsZero() {
			continue
		}
		if err := check(f, v.FieldByIndex(f.Index)); err != nil {
			errs = append(errs, Errorf("%s.%s is %w", group, cmp.Or(f.Tag.Get("name"), f.Name), err))
		}
	}
	return errors.Join(errs...)
}

func check(f reflect.StructField, v reflect.Value) error {
	if list, ok := f.Tag.Lookup("oneof"); ok && !slices.Contains(strings.Split(list, ","), v.String()) {
		return fmt.Errorf("%q, must be %s", v, strings.ReplaceAll(list, ",", " or "))
	}
	least, bounded := f.Tag.Lookup("min")
	most, above := f.Tag.Lookup("max")
	switch {
	case !bounded:
		return nil
	case !(number(v) >= number(parse(f.Type, least))): // NaN is out of bounds too
	case above && !(number(v) <= number(parse(f.Type, most))):
	default:
		return nil
	}
	if above {
		return fmt.Errorf("%v, must be %s to %s", v, least, most)
	}
	return fmt.Errorf("%v, must be at least %v", v, parse(f.Type, least))
}

func number(v reflect.Value) float64 {
	if v.CanInt() {
		return float64(v.Int())
	}
	return v.Float()
}

// parse reads the text of a tag. It panics if the text is not a value of the type.
func parse(t reflect.Type, text string) reflect.Value {
	var value any
	var err error
	switch {
	case t == reflect.TypeFor[time.Duration]():
		value, err = time.ParseDuration(text)
	case t.Kind() == reflect.Float64:
		value, err = strconv.ParseFloat(text, 64)
	case t.Kind() == reflect.String:
		value = text
	default:
		value, err = strconv.ParseInt(text, 10, 64)
	}
	if err != nil {
		panic(fmt.Sprintf("settings: tag %q of a %s: %v", text, t, err))
	}
	return reflect.ValueOf(value).Convert(t)
}

// WebAddress returns an error if an address is neither empty nor an HTTP address.
func WebAddress(setting, address string) error {
	if address == "" {
		return nil
	}
	if u, err := url.Parse(address); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return Errorf("%s is %q, must be http://host or https://host", setting, Redact(address))
	}
	return nil
}

// HostPort returns an error if an address is not host:port.
func HostPort(setting, address string) error {
	_, port, err := net.SplitHostPort(address)
	if _, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil {
		return Errorf("%s is %q, must be host:port", setting, address)
	}
	return nil
}

// StreamName returns an error if a name cannot be the name of a stream.
func StreamName(setting, name string) error {
	if name == "" || strings.ContainsFunc(name, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune(`.*>/\`, r)
	}) {
		return Errorf("%s is %q, must be the name of a stream, without spaces and . * > / \\", setting, name)
	}
	return nil
}

// Redact returns comma-separated addresses without user and password.
func Redact(addresses string) string {
	list := strings.Split(addresses, ",")
	for i, s := range list {
		if u, err := url.Parse(strings.TrimSpace(s)); err == nil && u.Host != "" {
			u.User = nil
			list[i] = u.String()
		}
	}
	return strings.Join(list, ",")
}
