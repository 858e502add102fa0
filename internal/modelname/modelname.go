// Package modelname holds the rule for the names of models. Events, ensembles and settings name the same models.
package modelname

import "regexp"

// Rule says what a name must be.
const Rule = "1 to 64 of a-z 0-9 - _, beginning with a letter"

var pattern = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,63}$`)

// Valid reports whether name keeps the rule.
func Valid(name string) bool { return pattern.MatchString(name) }
