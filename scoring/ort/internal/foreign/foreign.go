// Package foreign installs a signal handler as a foreign library would, for the tests of package ort.
package foreign

/*
#include <signal.h>
#include <string.h>

static void foreign(int signal) { (void)signal; }

static void install(int number) {
	struct sigaction action;
	memset(&action, 0, sizeof action);
	action.sa_handler = foreign;
	sigaction(number, &action, NULL);
}

static int installed(int number) {
	struct sigaction now;
	return sigaction(number, NULL, &now) == 0 && now.sa_handler == foreign;
}
*/
import "C"

// Install installs a handler that does nothing, without the alternate stack that Go's handlers need.
func Install(signal int) { C.install(C.int(signal)) }

// Installed reports whether the handler of Install is in place.
func Installed(signal int) bool { return C.installed(C.int(signal)) != 0 }
