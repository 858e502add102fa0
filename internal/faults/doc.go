// Package faults breaks the dependencies of decuwatch and compares the producer's own log with the result: `make
// faults`.
//
// Everything is real: the decuwatch binary, nats-server, PostgreSQL, the engine with the tiny ensemble. A proxy between
// a worker and its servers reads the frames of both protocols. It lets a run kill a worker at a stage of an event (see
// stages) without a hook in the product, and delay, drop or cut what either side sends.
//
// A scenario is a row of the fault matrix in docs/reliability.md. One run of it draws its faults and their timing from
// a seed, which is printed and can be replayed. A run ends when the backlog has drained. Then the producer's log is
// compared with Postgres and the stream of alerts. Only afterwards is `decuwatch reconcile` run, and its answer
// compared with the log.
//
// `go test` runs one seed of each quick scenario. The flags of the test binary run the rest: -seeds, -seed, -scenario,
// -all, -report.
package faults
