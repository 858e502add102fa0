package faults

import (
	"time"

	"github.com/decuwatch/decuwatch/scoring/ort/ortfault"
)

func deviceScenarios() []scenario {
	return []scenario{
		{
			name: "device-fails", quick: true, setup: shimmed,
			does: "every run of ONNX Runtime fails or returns NaN for 4 to 8 s: not ready, no dead letter, all events " +
				"scored after",
			run: func(r *run) {
				r.shim.Set(ortfault.OK)
				w := r.worker(r.shim.Env()...)
				stop := r.load()
				if !r.working(10) {
					return
				}
				mode := []ortfault.Mode{ortfault.Error, ortfault.NaN}[r.rng.IntN(2)]
				r.shim.Set(mode)
				r.broke("every run of ONNX Runtime ends in %s", mode)
				began := time.Now()
				r.notReady(w)
				time.Sleep(time.Until(began.Add(r.between(4*time.Second, 8*time.Second)))) // the length of the fault
				r.shim.Set(ortfault.OK)
				r.mend()
				stop()
				r.settle()
				r.readyAgain(w)
			},
		},
		{
			name: "device-hangs", setup: shimmed,
			does: "ONNX Runtime hangs in one of two workers: the other takes its events, and the hung one is not ready",
			run: func(r *run) {
				r.flags = with(r.flags, "--consumers.handle-timeout=3s")
				r.shim.Set(ortfault.OK)
				hung := r.worker(r.shim.Env()...)
				stop := r.load()
				if !r.working(10) {
					return
				}
				r.worker()
				r.shim.Set(ortfault.Hang)
				r.broke("ONNX Runtime hangs in one of two workers")
				r.notReady(hung)
				stop()
				r.producer.publish(20)
				r.settleWithin(time.Minute)
				if ready, _ := hung.ready(); ready {
					r.violate("the worker whose runtime hangs is ready")
				}
				hung.kill()
			},
		},
		{
			name: "device-hangs-sigterm", setup: shimmed,
			does: "SIGTERM while ONNX Runtime hangs: the process ends within the drain timeout and a margin, and " +
				"another worker takes over",
			run: func(r *run) {
				r.flags = with(r.flags, "--consumers.handle-timeout=30s")
				r.shim.Set(ortfault.OK)
				w := r.worker(r.shim.Env()...)
				stop := r.load()
				if !r.working(10) {
					return
				}
				r.shim.Set(ortfault.Hang)
				r.sleep(0, 3*time.Second)
				began := time.Now()
				w.signal(15)
				code := w.exit(20 * time.Second)
				r.broke("SIGTERM while ONNX Runtime hangs, exit code %d after %s", code, time.Since(began).Round(time.Millisecond))
				if code == -2 {
					r.violate("the worker still runs 20 s after SIGTERM, its drain timeout is 10 s")
					w.kill()
				}
				r.shim.Set(ortfault.OK)
				r.worker()
				stop()
				r.settle()
			},
		},
	}
}
