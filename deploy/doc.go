// Package deploy holds the files that decuwatch is run with, and the tests that hold them against the program and
// against the servers they are for.
package deploy
