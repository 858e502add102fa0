package consumers_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// float32s returns a raw latent of 4x8x8 numbers.
func float32s() []byte {
	raw := make([]byte, 0, 4*4*8*8)
	for i := range 4 * 8 * 8 {
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(float32(i)/7))
	}
	return raw
}

// tensorFile returns a safetensors file of one tensor.
func tensorFile(t *testing.T, dtype string, shape []int, numbers []byte) []byte {
	t.Helper()
	header, err := json.Marshal(map[string]any{
		"__metadata__": map[string]string{"format": "pt"},
		"latent":       map[string]any{"dtype": dtype, "shape": shape, "data_offsets": []int{0, len(numbers)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(file, header...), numbers...)
}

func TestLatents(t *testing.T) {
	ctx := t.Context()
	js := natstest.Start(t).JetStream()
	l := schema.Latent{Format: schema.FormatRaw, Dtype: "float32", Shape: []int{4, 8, 8}}
	if _, err := schema.PublishLatent(ctx, js, "m", l, float32s()); !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("published without a bucket: %v", err)
	}
	latents := consumers.NewLatents(js, consumers.LatentConfig{})
	placed, err := l.Place("m", float32s())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := latents.Latent(ctx, placed, time.Now()); !errors.Is(err, schema.ErrLatentMissing) {
		t.Errorf("read without a bucket: %v", err)
	}
	if err := consumers.EnsureLatents(ctx, js, consumers.LatentConfig{}, 1, "m"); err != nil {
		t.Fatal(err)
	}
	if _, err := js.ObjectStore(ctx, "LATENTS_m"); !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("a bucket of no size: %v", err)
	}
	cfg := consumers.LatentConfig{MaxBytes: 16 << 20, MaxAge: time.Hour}
	for range 2 { // the second time it is there
		if err := consumers.EnsureLatents(ctx, js, cfg, 1, "m", "n"); err != nil {
			t.Fatal(err)
		}
	}

	// An object that is published twice stays one object, and is read as it was.
	for range 2 {
		got, err := schema.PublishLatent(ctx, js, "m", l, float32s())
		if err != nil || got.Name != placed.SHA256 || got.Bucket != "LATENTS_m" {
			t.Fatalf("%+v %v", got, err)
		}
	}
	object, err := latents.Latent(ctx, placed, time.Now())
	if err != nil || !bytes.Equal(object, float32s()) {
		t.Fatalf("%d bytes, %v", len(object), err)
	}
	numbers, err := placed.Numbers(object)
	if err != nil || !bytes.Equal(numbers, object) {
		t.Errorf("numbers: %v", err)
	}

	// One tensor in a file, with the side of its batch.
	file := tensorFile(t, "F16", []int{1, 4, 8, 8}, float32s()[:512])
	described, err := schema.DescribeLatent(file)
	if err != nil || described.Dtype != "float16" {
		t.Fatalf("%+v %v", described, err)
	}
	described.Name = "render-7/1.safetensors"
	inFile, err := schema.PublishLatent(ctx, js, "n", described, file)
	if err != nil {
		t.Fatal(err)
	}
	if object, err = latents.Latent(ctx, *inFile, time.Now()); err != nil {
		t.Fatal(err)
	}
	if numbers, err = inFile.Numbers(object); err != nil || !bytes.Equal(numbers, float32s()[:512]) {
		t.Errorf("numbers of a file: %d bytes, %v", len(numbers), err)
	}
}

// A latent that comes after its event is waited for, but not longer than the wait, counted from the event.
func TestLatentsThatComeLater(t *testing.T) {
	ctx := t.Context()
	js := natstest.Start(t).JetStream()
	if err := consumers.EnsureLatents(ctx, js, consumers.LatentConfig{MaxBytes: 16 << 20, MaxAge: time.Hour}, 1,
		"m"); err != nil {
		t.Fatal(err)
	}
	l := schema.Latent{Format: schema.FormatRaw, Dtype: "float32", Shape: []int{4, 8, 8}}
	placed, err := l.Place("m", float32s())
	if err != nil {
		t.Fatal(err)
	}
	latents := consumers.NewLatents(js, consumers.LatentConfig{Wait: time.Minute})
	if _, err := latents.Latent(ctx, placed, time.Now().Add(-time.Minute)); !errors.Is(err, schema.ErrLatentMissing) {
		t.Errorf("an old event: %v", err)
	}
	canceled, cancel := context.WithCancelCause(ctx)
	cancel(errors.New("stopped"))
	if _, err := latents.Latent(canceled, placed, time.Now()); err == nil || errors.Is(err, schema.ErrLatentMissing) {
		t.Errorf("a stop says that there is no latent: %v", err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := latents.Latent(ctx, placed, time.Now())
		got <- err
	}()
	if _, err := schema.PublishLatent(ctx, js, "m", l, float32s()); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Errorf("a latent that came later: %v", err)
	}
}

// What a producer can write into its bucket is refused by name, or does not count as an object.
func TestLatentsOfHostileProducers(t *testing.T) {
	ctx := t.Context()
	js := natstest.Start(t).JetStream()
	if err := consumers.EnsureLatents(ctx, js, consumers.LatentConfig{MaxBytes: 16 << 20, MaxAge: time.Hour}, 1, "m",
		"secret"); err != nil {
		t.Fatal(err)
	}
	l := schema.Latent{Format: schema.FormatRaw, Dtype: "float32", Shape: []int{4, 8, 8}}
	other, err := schema.PublishLatent(ctx, js, "secret", l, float32s())
	if err != nil {
		t.Fatal(err)
	}
	bucket, err := js.ObjectStore(ctx, "LATENTS_m")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := js.ObjectStore(ctx, "LATENTS_secret")
	if err != nil {
		t.Fatal(err)
	}
	info, err := theirs.GetInfo(ctx, other.Name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bucket.AddLink(ctx, "link", info); err != nil {
		t.Fatal(err)
	}
	if _, err := bucket.PutBytes(ctx, "large", make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if _, err := bucket.PutBytes(ctx, "short", make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	status := nats.NewMsg("$O.LATENTS_m.M." + base64.URLEncoding.EncodeToString([]byte("status")))
	status.Header.Set("Status", "404")
	if _, err := js.PublishMsg(ctx, status); err != nil {
		t.Fatal(err)
	}
	broken := nats.NewMsg("$O.LATENTS_m.M." + base64.URLEncoding.EncodeToString([]byte("broken")))
	broken.Data = []byte("{")
	if _, err := js.PublishMsg(ctx, broken); err != nil {
		t.Fatal(err)
	}
	latents := consumers.NewLatents(js, consumers.LatentConfig{})
	for name, says := range map[string]string{
		"link": "is a link", "large": "1048576 bytes", "short": "SHA-256", "status": "", "broken": "",
	} {
		l := *other
		l.Bucket, l.Name = "LATENTS_m", name
		object, err := latents.Latent(ctx, l, time.Now())
		if err == nil {
			_, err = l.Numbers(object)
		}
		var refused *schema.LatentError
		if err == nil || says != "" && (!errors.As(err, &refused) || !strings.Contains(err.Error(), says)) {
			t.Errorf("%s: %v, want %q", name, err, says)
		}
	}
	for says, file := range map[string][]byte{
		"shorter than 8":     []byte("abc"),
		"header has":         append(binary.LittleEndian.AppendUint64(nil, 1<<40), "{}"...),
		"0 tensors":          append(binary.LittleEndian.AppendUint64(nil, 2), "{}"...),
		"type \"I64\"":       tensorFile(t, "I64", []int{1, 1, 1}, make([]byte, 8)),
		"safetensors header": append(binary.LittleEndian.AppendUint64(nil, 2), "[]"...),
	} {
		if _, err := schema.DescribeLatent(file); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("a file: %v, want %q", err, says)
		}
	}
	twoSides := tensorFile(t, "F32", []int{4, 64}, float32s())
	l.Format = schema.FormatSafetensors
	if _, err := l.Place("m", twoSides); err == nil || !strings.Contains(err.Error(), "[4 64]") {
		t.Errorf("a tensor of another shape: %v", err)
	}
}
