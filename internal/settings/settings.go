// Package settings holds what the owners of groups of settings share.
package settings

import "fmt"

// Error is an error in a setting, a flag or an argument: the user can fix it, and retrying will not help.
type Error struct{ Err error }

func (e Error) Error() string { return e.Err.Error() }
func (e Error) Unwrap() error { return e.Err }

// Errorf returns an [Error] with the formatted text. It names the setting.
func Errorf(format string, args ...any) error { return Error{fmt.Errorf(format, args...)} }
