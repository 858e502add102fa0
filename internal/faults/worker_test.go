package faults

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// build compiles decuwatch once and returns the path of the binary.
func build(dir string) (string, error) {
	path := filepath.Join(dir, "decuwatch")
	out, err := exec.Command("go", "build", "-o", path, "github.com/decuwatch/decuwatch/cmd/decuwatch").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build decuwatch: %w: %s", err, out)
	}
	return path, nil
}

// process is a child that runs decuwatch. It ends with this process.
type process struct {
	t     testing.TB
	cmd   *exec.Cmd
	log   string
	ended chan struct{}
}

// start runs a binary with a verb and its flags; env is added to the environment.
func start(t testing.TB, binary string, env []string, args ...string) *process {
	t.Helper()
	p := &process{t: t, log: filepath.Join(t.TempDir(), "log"), ended: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.cmd = exec.Command(binary, args...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // its state is read afterwards
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() && args[0] == "serve" {
			t.Logf("the worker's log: ...%s", p.tail(6000))
		}
	})
	return p
}

// tail returns the end of the log.
func (p *process) tail(size int) string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-size):])
}

// running reports whether the process has not ended.
func (p *process) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

func (p *process) signal(s syscall.Signal) {
	if p.running() {
		_ = p.cmd.Process.Signal(s) // it may have ended meanwhile
	}
}

// kill ends the process as a power failure would, and waits until it has ended. A stopped process dies, too.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.ended
}

// exit waits until the process has ended and returns its exit code, -1 if it was killed, or -2 if it still runs after a
// time.
func (p *process) exit(atMost time.Duration) int {
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(atMost):
		return -2
	}
}

var servingLine = regexp.MustCompile(`msg=serving .*metrics=http://([^/ ]+)/metrics`)

// address returns the address of a worker's /readyz, or "" if it does not serve yet.
func (p *process) address() string {
	if m := servingLine.FindStringSubmatch(p.tail(1 << 20)); m != nil {
		return m[1]
	}
	return ""
}

// ready asks a worker whether it is ready, and returns its answer if not. An error is an answer, too: "not ready".
func (p *process) ready() (bool, string) {
	address := p.address()
	if address == "" {
		return false, "it does not serve"
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		return false, err.Error()
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return false, err.Error()
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return false, err.Error()
	}
	return answer.StatusCode == http.StatusOK, strings.TrimSpace(string(text))
}

// workerFlags are the settings of a worker under test: short waits, so that a run takes seconds.
func workerFlags() []string {
	return []string{
		"--metrics.address=127.0.0.1:0", "--review.address=none", "--review.workers=0", "--scoring.threads=1",
		"--consumers.ack-wait=1s", "--consumers.max-in-flight=16", "--consumers.retry-delay=50ms",
		"--consumers.retry-max-delay=500ms", "--consumers.drain-timeout=10s",
		"--postgres.commit-timeout=2s", "--postgres.lock-timeout=1s",
		// Every alert is sent, and every alert is about a score.
		"--volume.class-per-hour=0", "--volume.model-per-hour=0", "--patrol.run-length=1e300",
	}
}

// with returns flags with other values for some of them.
func with(flags []string, changed ...string) []string {
	flags = slices.Clone(flags)
	for _, c := range changed {
		name, _, _ := strings.Cut(c, "=")
		flags = slices.DeleteFunc(flags, func(f string) bool { return strings.HasPrefix(f, name+"=") })
		flags = append(flags, c)
	}
	return flags
}
