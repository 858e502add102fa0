package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor/replay"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/diffusion"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// halves are the bits of float16 numbers around 1, of which there are as many as asked for.
func halves(n int) []byte {
	var numbers []byte
	for i := range n {
		numbers = binary.LittleEndian.AppendUint16(numbers, 0x3800+uint16(37*i%0x600)|uint16(i%2)<<15)
	}
	return numbers
}

// writeTensor writes a safetensors file of one float16 tensor.
func writeTensor(t *testing.T, shape []int, numbers []byte) string {
	t.Helper()
	header, err := json.Marshal(map[string]any{"latents": map[string]any{"dtype": "F16", "shape": shape,
		"data_offsets": []int{0, len(numbers)}}})
	if err != nil {
		t.Fatal(err)
	}
	file := append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...)
	path := filepath.Join(t.TempDir(), "latent.safetensors")
	if err := os.WriteFile(path, append(file, numbers...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// An event with a float16 latent of its producer goes the whole way: its score stands on that latent, replay agrees
// with it as long as the latent is there, and says so when it is gone. The producers are a U-Net with DDIM and a
// transformer of flow matching.
func TestLatentsFromProducerToReplay(t *testing.T) {
	for _, path := range []string{judged, "../../scoring/testdata/tiny-flow"} {
		e, err := ensemble.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(e.Name, func(t *testing.T) { testLatents(t, e) })
	}
}

func testLatents(t *testing.T, e *ensemble.Ensemble) {
	nats := natstest.Start(t)
	db := pgtest.URL(t)
	user := command{t, []string{"DECUWATCH_NATS_URL=" + nats.URL(), "DECUWATCH_POSTGRES_URL=" + db}}
	latent := []int{e.Latent.Channels, e.Latent.Height, e.Latent.Width}
	name, bucketName := e.Name, "LATENTS_"+e.Name
	n := latent[0] * latent[1] * latent[2]
	file := writeTensor(t, append([]int{1}, latent...), halves(n))
	raw := filepath.Join(t.TempDir(), "later.bin")
	if err := os.WriteFile(raw, halves(n), 0o600); err != nil {
		t.Fatal(err)
	}
	event := []string{"publish", "--model=" + name, "--class=0", "--seed=0"}
	_, errs := user.run(exitFailed, append(event, "--latent="+file)...)
	holds(t, errs, "latents.max-bytes")

	serve := start(t, user.env, "serve", "-e", e.Path, "--metrics.address=127.0.0.1:0", "--review.address=127.0.0.1:0",
		"--scoring.threads=1", "--latents.max-bytes=16777216", "--latents.wait=0s")
	mux := metricsAddress(t, serve)
	isReady(t, mux)
	js := nats.JetStream()
	natstest.Until(t, "the bucket is there", func() bool {
		_, err := js.ObjectStore(t.Context(), bucketName)
		return err == nil
	})
	_, errs = user.run(exitUsage, append(event, "--latent="+raw)...)
	holds(t, errs, "bytes of numbers")
	_, errs = user.run(exitUsage, append(event, "--shape=4,8,8")...)
	holds(t, errs, "--latent FILE")

	user.run(exitOK, append(event, "--id=seed")...)
	user.run(exitOK, append(event, "--id=own", "--latent="+file)...)
	shape := strings.Trim(strings.ReplaceAll(fmt.Sprint(latent), " ", ","), "[]")
	steps, err := diffusion.Steps(e.Diffusion, 8, 0)
	if err != nil {
		t.Fatal(err)
	}
	user.run(exitOK, append(event, "--id=later", "--latent="+raw, "--dtype=float16", "--shape="+shape, "--step=3",
		fmt.Sprintf("--timestep=%g", steps[3].Timestep), "--steps=8", "--guidance=2",
		"--sampler="+e.Diffusion.Sampler())...)
	gone := `{"model":"` + name + `","class":0,"seed":0,"latent":{"bucket":"` + bucketName + `","name":"gone","sha256":"` +
		strings.Repeat("0", 64) + `","format":"raw","dtype":"float16","shape":[` + shape + `]}}`
	user.feed(gone, exitOK, "publish", "-")
	natstest.Until(t, "all events have their verdict", func() bool {
		_, metrics := get(t, mux+"/metrics")
		return strings.Contains(metrics, `decuwatch_events_total{model="`+name+`",outcome="score",reason="none"} 3`) &&
			strings.Contains(metrics, `decuwatch_events_total{model="`+name+`",outcome="skip",reason="latent"} 1`)
	})
	scores := map[string]schema.Score{}
	for _, id := range []string{"seed", "own", "later"} {
		r := decode[replay.Replay](t, first(user.run(exitOK, "replay", "-e", e.Path, "--json", id)))
		if scores[id] = r.Stored; !r.Agrees {
			t.Errorf("%s: replay does not agree: %+v", id, r)
		}
	}
	own, later := scores["own"].Receipt, scores["later"].Receipt
	if own.LatentSHA256 == "" || own.LatentStep != 0 || scores["seed"].Receipt.LatentSHA256 != "" ||
		scores["own"].ClassGap.Value == scores["seed"].ClassGap.Value {
		t.Errorf("the latent made no difference: %+v and %+v", scores["own"], scores["seed"])
	}
	if later.LatentStep != 3 || !strings.HasPrefix(later.Settings, e.Diffusion.Sampler()+" start=3 ") ||
		scores["later"].ClassGap.BranchStep != 3 || len(later.Deviations) != 0 {
		t.Errorf("later latent: %+v", scores["later"])
	}

	// The same score from the command line, and SQL that names the latent.
	conn, err := pgx.Connect(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var count int
	if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM decuwatch.scores
		WHERE first_latent->>'latent_sha256' = requested->'latent'->>'sha256'`).Scan(&count); err != nil || count != 2 {
		t.Errorf("%d scores name their latent, %v", count, err)
	}

	bucket, err := js.ObjectStore(t.Context(), bucketName)
	if err != nil {
		t.Fatal(err)
	}
	if err := bucket.Delete(t.Context(), own.LatentSHA256); err != nil {
		t.Fatal(err)
	}
	_, errs = user.run(exitFailed, "replay", "-e", e.Path, "own")
	holds(t, errs, "no such object", own.LatentSHA256)
}
