package ort

/*
#include <signal.h>

// Signals above 31 are real-time ones, of which glibc keeps some for itself.
#define LAST_SIGNAL 31

static struct sigaction kept[LAST_SIGNAL + 1];

static void keep_signals(void) {
	for (int i = 1; i <= LAST_SIGNAL; i++) sigaction(i, NULL, &kept[i]);
}

// Puts back every handler that changed, unless Go itself installed it: Go has one handler for all signals, and SIGSEGV
// always has it.
static void restore_signals(void) {
	for (int i = 1; i <= LAST_SIGNAL; i++) {
		struct sigaction now;
		if (sigaction(i, NULL, &now) != 0) continue;
		if (now.sa_sigaction == kept[i].sa_sigaction || now.sa_sigaction == kept[SIGSEGV].sa_sigaction) continue;
		sigaction(i, &kept[i], NULL);
	}
}
*/
import "C"

import "sync"

var signals sync.Mutex

// keepSignals calls f and then puts back the signal handlers that f replaced. ONNX Runtime's CUDA provider installs
// its own when it is loaded and at its first run, without the alternate stack that Go's need: the next signal would
// end the process instead of being delivered.
func keepSignals(f func() error) error {
	signals.Lock()
	defer signals.Unlock()
	C.keep_signals()
	defer C.restore_signals()
	return f()
}
