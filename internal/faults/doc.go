// Package faults breaks what decuwatch depends on and holds the producer's own log against what is left: `make
// faults`.
//
// Everything is real: the decuwatch binary, nats-server, PostgreSQL, the engine with the tiny ensemble. Between a
// worker and its servers stands a proxy that knows the frames of both protocols. It lets a run kill a worker at a
// stage of an event's life (see stages) without a hook in the product, and delay, drop or cut what either side says.
//
// A scenario is a row of the fault matrix in docs/reliability.md. One run of it draws its faults and their timing
// from a seed, which is printed and can be replayed. A run ends when the backlog has drained; then the producer's log
// is held against Postgres and the stream of alerts. Only after that is `decuwatch reconcile` asked, and its answer
// compared with what the log says.
//
// `go test` runs one seed of each quick scenario. The flags of the test binary run the rest: -seeds, -seed,
// -scenario, -all, -report.
package faults
