package schema

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
)

// Latent names a latent of the producer, an object of a NATS Object Store. A rerun begins there instead of drawing the
// first latent from the seed.
type Latent struct {
	Bucket string `json:"bucket"` // LatentBucket of the event's model
	Name   string `json:"name"`   // of the object
	SHA256 string `json:"sha256"` // of the object's bytes, lower-case hex
	Format string `json:"format"` // raw or safetensors
	Dtype  string `json:"dtype"`  // float32, float16 or bfloat16
	Shape  []int  `json:"shape"`  // channels, height, width
	// Step is how many steps the producer's sampler had taken; 0 for a first latent.
	Step int `json:"step,omitempty"`
	// Timestep is what the sampler gives the model at that step; nil means unknown, for a first latent only.
	Timestep *float64 `json:"timestep,omitempty"`
}

// Formats of a latent.
const (
	FormatRaw         = "raw"         // numbers in row-major order, little-endian
	FormatSafetensors = "safetensors" // a file with exactly one tensor
)

// Bounds of a latent.
const (
	MaxLatentName = 256
	MaxLatentSide = 1024
	maxHeader     = 64 << 10 // bytes of the header of a safetensors file
)

// LatentBucket returns the bucket of a model's latents. Each model has its own, because NATS can grant a producer the
// right to write a bucket, but not a part of one.
func LatentBucket(model string) string { return "LATENTS_" + model }

// LatentError says why a latent cannot be used. Retrying will not help.
type LatentError struct{ Reason string }

func (e *LatentError) Error() string { return "latent: " + e.Reason }

func latentError(format string, args ...any) error {
	return &LatentError{fmt.Sprintf(format, args...)}
}

// ErrLatentMissing is wrapped in the error of a reader of latents if there is no such object.
var ErrLatentMissing = errors.New("latent: no such object")

var (
	bucketPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)
	objectPattern = regexp.MustCompile(`^[!-~]{1,256}$`)
	digestPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// latentDtypes are the number types of a latent, with their sizes in bytes and their names in safetensors.
var latentDtypes = []struct {
	name, tensor string
	size         int
}{{"float32", "F32", 4}, {"float16", "F16", 2}, {"bfloat16", "BF16", 2}}

func (r *reader) latent() *Latent {
	if !r.has("latent") {
		return nil
	}
	f := newReader(r.members["latent"], r.path("latent"), "bucket", "name", "sha256", "format", "dtype", "shape", "step",
		"timestep")
	var dtypes []string
	for _, d := range latentDtypes {
		dtypes = append(dtypes, d.name)
	}
	l := Latent{
		Bucket: f.matching("bucket", bucketPattern, "1 to 128 of A-Z a-z 0-9 _ -"),
		Name:   f.matching("name", objectPattern, "1 to 256 printable ASCII characters without spaces"),
		SHA256: f.matching("sha256", digestPattern, "64 lower-case hexadecimal digits"),
		Format: f.oneOf("format", FormatRaw, FormatSafetensors),
		Dtype:  f.oneOf("dtype", dtypes...),
		Shape:  f.shape(),
	}
	if f.has("timestep") {
		l.Timestep = new(f.real("timestep"))
	}
	if f.has("step") {
		l.Step = int(f.integer("step")) //nolint:gosec // below MaxSteps
		if !f.has("timestep") {
			f.refuse("step", "needs timestep")
		}
	}
	_, later := f.members["step"]
	if r.err = f.err; later && !r.has("sampler") {
		r.refuse("latent.step", "needs sampler")
	}
	return &l
}

func (r *reader) matching(name string, pattern *regexp.Regexp, must string) string {
	s := required[string](r, name, "string")
	if !pattern.MatchString(s) {
		r.refuse(name, "must be %s", must)
	}
	return s
}

func (r *reader) oneOf(name string, allowed ...string) string {
	s := required[string](r, name, "string")
	if !slices.Contains(allowed, s) {
		r.refuse(name, "%s must be one of %s", quote(s), strings.Join(allowed, ", "))
	}
	return s
}

func (r *reader) shape() []int {
	sides := required[[]any](r, "shape", "list of three integers")
	if len(sides) != 3 {
		r.refuse("shape", "has %d numbers, must have 3: channels, height, width", len(sides))
	}
	var shape []int
	for i, side := range sides {
		at := fmt.Sprintf("%s[%d]", r.path("shape"), i)
		n, ok := side.(json.Number)
		if !ok {
			r.refuse("shape", "must be a list of three integers")
		}
		if r.err != nil {
			return nil
		}
		var v uint64
		v, r.err = integer(n, at, "1", number(MaxLatentSide))
		shape = append(shape, int(v)) //nolint:gosec // at most MaxLatentSide
	}
	return shape
}

// Size returns the number of bytes of the latent's numbers.
func (l Latent) Size() int {
	size := 0
	for _, d := range latentDtypes {
		if d.name == l.Dtype {
			size = d.size
		}
	}
	for _, side := range l.Shape {
		size *= side
	}
	return size
}

// MaxObject returns how many bytes the latent's object has at most.
func (l Latent) MaxObject() int {
	if l.Format == FormatSafetensors {
		return l.Size() + 8 + maxHeader
	}
	return l.Size()
}

// Numbers returns the bytes of the latent's numbers in its object, little-endian. The error is a *LatentError if the
// object is not what the latent says.
func (l Latent) Numbers(object []byte) ([]byte, error) {
	sum := sha256.Sum256(object)
	if digest := hex.EncodeToString(sum[:]); digest != l.SHA256 {
		return nil, latentError("the object has SHA-256 %s, the event says %s", digest, l.SHA256)
	}
	if l.Format == FormatSafetensors {
		dtype, shape, numbers, err := readTensor(object)
		if err != nil {
			return nil, err
		}
		if dtype != l.Dtype || !slices.Equal(shape, l.Shape) {
			return nil, latentError("the tensor is %s %v, the event says %s %v", dtype, shape, l.Dtype, l.Shape)
		}
		object = numbers
	}
	if len(object) != l.Size() {
		return nil, latentError("the object has %d bytes of numbers, %s %v has %d", len(object), l.Dtype, l.Shape, l.Size())
	}
	return object, nil
}

// readTensor reads a safetensors file with one tensor. Leading sides of 1, such as that of a batch, are left out until
// three are left.
func readTensor(file []byte) (dtype string, shape []int, numbers []byte, err error) {
	if len(file) < 8 {
		return "", nil, nil, latentError("not a safetensors file: shorter than 8 bytes")
	}
	length := binary.LittleEndian.Uint64(file)
	if length > maxHeader || length > uint64(len(file)-8) {
		return "", nil, nil, latentError("the safetensors header has %d bytes, at most %d are read", length,
			min(maxHeader, len(file)-8))
	}
	var header map[string]struct {
		Dtype   string `json:"dtype"`
		Shape   []int  `json:"shape"`
		Offsets []int  `json:"data_offsets"`
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(file[8:8+length], &members); err != nil {
		return "", nil, nil, latentError("safetensors header: %s", err)
	}
	delete(members, "__metadata__")
	if len(members) != 1 {
		return "", nil, nil, latentError("the safetensors file has %d tensors, must have 1", len(members))
	}
	text, err := json.Marshal(members)
	if err == nil {
		err = json.Unmarshal(text, &header)
	}
	if err != nil {
		return "", nil, nil, latentError("safetensors header: %s", err)
	}
	numbers = file[8+length:]
	for _, t := range header {
		for _, d := range latentDtypes {
			if d.tensor == t.Dtype {
				dtype = d.name
			}
		}
		if dtype == "" {
			return "", nil, nil, latentError("the tensor has type %s, must be F32, F16 or BF16", quote(t.Dtype))
		}
		for shape = t.Shape; len(shape) > 3 && shape[0] == 1; {
			shape = shape[1:]
		}
		if !slices.Equal(t.Offsets, []int{0, len(numbers)}) {
			return "", nil, nil, latentError("the tensor has data_offsets %v, must fill the file: 0 to %d", t.Offsets,
				len(numbers))
		}
	}
	return dtype, shape, numbers, nil
}

// DescribeLatent returns what an event says of the latent in a safetensors file. It lacks the place of the object.
func DescribeLatent(file []byte) (Latent, error) {
	dtype, shape, _, err := readTensor(file)
	return Latent{Format: FormatSafetensors, Dtype: dtype, Shape: shape}, err
}

// ObjectStores is the part of jetstream.JetStream that PublishLatent needs.
type ObjectStores interface {
	ObjectStore(ctx context.Context, bucket string) (jetstream.ObjectStore, error)
}

// Place returns the latent with the digest of its object and its place in the model's bucket. If the name is "", the
// object is named by its SHA-256. The error is a *LatentError if the object is not what the latent says.
func (l Latent) Place(model string, object []byte) (Latent, error) {
	sum := sha256.Sum256(object)
	l.SHA256, l.Bucket = hex.EncodeToString(sum[:]), LatentBucket(model)
	if l.Name == "" {
		l.Name = l.SHA256
	}
	_, err := l.Numbers(object)
	return l, err
}

// PublishLatent stores a latent's object in the model's bucket, and returns what the event says of it as data.latent.
// Format, dtype, shape, step and timestep are the caller's. If the name is "", the object is named by its SHA-256, so
// that it is safe to publish it again.
//
// If the object is not what l says, the error is a *LatentError and nothing is sent.
func PublishLatent(ctx context.Context, js ObjectStores, model string, l Latent, object []byte) (*Latent, error) {
	l, err := l.Place(model, object)
	if err != nil {
		return nil, err
	}
	store, err := js.ObjectStore(ctx, l.Bucket)
	if err != nil {
		return nil, fmt.Errorf("publish latent: bucket %s: %w", l.Bucket, err)
	}
	_, err = store.GetInfo(ctx, l.Name)
	if err == nil && l.Name == l.SHA256 {
		return &l, nil // it holds these bytes already
	}
	meta := jetstream.ObjectMeta{Name: l.Name, Opts: &jetstream.ObjectMetaOptions{ChunkSize: 64 << 10}}
	if _, err = store.Put(ctx, meta, bytes.NewReader(object)); err != nil {
		return nil, fmt.Errorf("publish latent %s to %s: %w", l.Name, l.Bucket, err)
	}
	return &l, nil
}

// ReadObject returns the object of a latent. The error wraps ErrLatentMissing if there is none, and is a *LatentError
// if it is a link or too large. Its digest is not checked yet.
func ReadObject(ctx context.Context, js ObjectStores, l Latent) ([]byte, error) {
	store, err := js.ObjectStore(ctx, l.Bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, fmt.Errorf("%w: there is no bucket %s", ErrLatentMissing, l.Bucket)
	}
	if err != nil {
		return nil, fmt.Errorf("latent: bucket %s: %w", l.Bucket, err)
	}
	info, err := store.GetInfo(ctx, l.Name)
	switch {
	case errors.Is(err, jetstream.ErrObjectNotFound):
		return nil, fmt.Errorf("%w: %s in %s", ErrLatentMissing, l.Name, l.Bucket)
	case errors.Is(err, jetstream.ErrBadObjectMeta):
		return nil, latentError("%s in %s: %s", l.Name, l.Bucket, err)
	case err != nil:
		return nil, fmt.Errorf("latent %s in %s: %w", l.Name, l.Bucket, err)
	case info.Opts != nil && info.Opts.Link != nil:
		return nil, latentError("%s in %s is a link", l.Name, l.Bucket)
	case info.Size > uint64(l.MaxObject()):
		return nil, latentError("%s in %s has %d bytes, %s %v has at most %d", l.Name, l.Bucket, info.Size, l.Dtype, l.Shape,
			l.MaxObject())
	}
	object, err := store.Get(ctx, l.Name)
	if err != nil {
		return nil, fmt.Errorf("latent %s in %s: %w", l.Name, l.Bucket, err)
	}
	defer object.Close() //nolint:errcheck // only read
	content, err := io.ReadAll(io.LimitReader(object, int64(l.MaxObject())+1))
	if errors.Is(err, jetstream.ErrDigestMismatch) {
		return nil, latentError("%s in %s: %s", l.Name, l.Bucket, err)
	}
	if err != nil {
		return nil, fmt.Errorf("latent %s in %s: %w", l.Name, l.Bucket, err)
	}
	return content, nil
}
