package faults

import (
	"golang.org/x/sys/unix"
)

const (
	rlimitNoFile = unix.RLIMIT_NOFILE
	rlimitAS     = unix.RLIMIT_AS
)

// limit lowers a soft limit of a running process, and returns what restores it.
func (r *run) limit(p *process, resource int, to uint64) (restore func()) {
	r.t.Helper()
	var old unix.Rlimit
	if err := unix.Prlimit(p.cmd.Process.Pid, resource, nil, &old); err != nil {
		r.t.Fatal(err)
	}
	if err := unix.Prlimit(p.cmd.Process.Pid, resource, &unix.Rlimit{Cur: to, Max: old.Max}, nil); err != nil {
		r.t.Fatal(err)
	}
	return func() {
		_ = unix.Prlimit(p.cmd.Process.Pid, resource, &old, nil) // it may have ended
	}
}
