package main

import (
	"os"
	"testing"

	"github.com/decuwatch/decuwatch/consumers/natstest"
)

// mainEnv makes the test binary run as decuwatch itself: a real process that tests can signal and kill.
const mainEnv = "DECUWATCH_TEST_MAIN"

func TestMain(m *testing.M) {
	natstest.RunIfChild()
	if os.Getenv(mainEnv) != "" {
		main()
	}
	os.Exit(m.Run())
}
