package ensemble

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// ManifestName is the manifest of a directory.
const ManifestName = "ensemble.json"

// maxManifest bounds a manifest: 100,000 classes of 64 components each stay below it.
const maxManifest = 64 << 20

// Ensemble is a verified ensemble. It is read-only and safe for concurrent use.
type Ensemble struct {
	Manifest
	Path     string // as it was opened: a directory, or a manifest
	Document []byte // the manifest's bytes
	Dir      string // that holds the manifest
	Digest   string // SHA-256 of the manifest's bytes, lower-case hex

	tables  map[string]*Tables
	byLabel map[string]int
}

// Open reads an ensemble and verifies it: the bounds of the manifest, size and SHA-256 of every file, the inputs,
// outputs, shapes, types and opset of the graphs, and the shape and finiteness of the tables. Path is a manifest, or
// a directory with an ensemble.json. The error names what does not fit. Open reads only files inside the directory
// that the manifest names, and follows no link.
func Open(path string) (*Ensemble, error) {
	e, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("open ensemble %s: %w", path, err)
	}
	return e, nil
}

func open(path string) (*Ensemble, error) {
	dir, name := path, ManifestName
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		dir, name = filepath.Split(path)
		if dir == "" {
			dir = "."
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()

	document, err := readPlain(root, name, maxManifest)
	if err != nil {
		return nil, err
	}
	m, err := decodeManifest(document)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	e := &Ensemble{
		Manifest: *m, Path: path, Document: document, Dir: filepath.Clean(dir), Digest: digest(document),
	}
	if err := e.readFiles(root); err != nil {
		return nil, err
	}
	e.byLabel = make(map[string]int, len(e.Classes))
	for i, class := range e.Classes {
		e.byLabel[class.Label] = i
	}
	return e, nil
}

// readFiles verifies the files of the manifest and takes the tables from theirs.
func (e *Ensemble) readFiles(root *os.Root) error {
	type part struct {
		file  File
		check func([]byte) error
	}
	parts := []part{{e.Files.UNet, e.checkUNet}, {e.Files.Decoder, e.checkDecoder}, {e.Files.Tables, e.readTables}}
	if e.Files.Judge != nil {
		parts = append(parts, part{*e.Files.Judge, e.checkJudge})
	}
	for _, part := range parts {
		content, err := readVerified(root, part.file)
		if err != nil {
			return err
		}
		if err := part.check(content); err != nil {
			return fmt.Errorf("%s: %w", part.file.Path, err)
		}
		for _, external := range part.file.External {
			if err := verify(root, external); err != nil {
				return err
			}
		}
	}
	return nil
}

// ReadFile returns the content of a file of the manifest, after it has checked size and SHA-256 again.
func (e *Ensemble) ReadFile(f File) ([]byte, error) {
	root, err := os.OpenRoot(e.Dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	content, err := readVerified(root, f)
	if err != nil {
		return nil, fmt.Errorf("read ensemble %s: %w", e.Dir, err)
	}
	return content, nil
}

// ClassIndex returns the index of the class with the given label.
func (e *Ensemble) ClassIndex(label string) (int, bool) {
	i, ok := e.byLabel[label]
	return i, ok
}

// Labels returns the labels of the classes in index order.
func (e *Ensemble) Labels() []string {
	labels := make([]string, len(e.Classes))
	for i, c := range e.Classes {
		labels[i] = c.Label
	}
	return labels
}

// TrainingImages returns how many training images of each class a component saw, at least.
func (e *Ensemble) TrainingImages() []int {
	images := make([]int, len(e.Classes))
	for i, class := range e.Classes {
		images[i] = slices.Min(class.Images)
	}
	return images
}

// WellSampled returns the classes of which the components saw the most images. The manifest's reference scores are
// scores of these classes.
func (e *Ensemble) WellSampled() []int {
	most, classes := -1, []int(nil)
	for i, class := range e.Classes {
		switch n := slices.Max(class.Images); {
		case n > most:
			most, classes = n, []int{i}
		case n == most:
			classes = append(classes, i)
		}
	}
	return classes
}

// openPlain opens a plain file directly inside root: a link, a device or a directory is refused.
func openPlain(root *os.Root, name string) (*os.File, fs.FileInfo, error) {
	before, err := root.Lstat(name)
	if err != nil {
		return nil, nil, err
	}
	if !before.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is not a plain file (%s)", name, before.Mode().Type())
	}
	file, err := root.Open(name)
	if err != nil {
		return nil, nil, err
	}
	after, err := file.Stat()
	if err == nil && !os.SameFile(before, after) {
		err = fmt.Errorf("%s was replaced while it was opened", name)
	}
	if err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	return file, after, nil
}

func readPlain(root *os.Root, name string, limit int64) ([]byte, error) {
	file, info, err := openPlain(root, name)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // only read
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are read", name, info.Size(), limit)
	}
	content, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(content)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return content, err
}

func readVerified(root *os.Root, f File) ([]byte, error) {
	if info, err := root.Lstat(f.Path); err == nil && info.Mode().IsRegular() && info.Size() != f.Size {
		return nil, fmt.Errorf("%s has %d bytes, the manifest says %d", f.Path, info.Size(), f.Size)
	}
	content, err := readPlain(root, f.Path, f.Size)
	if err != nil {
		return nil, err
	}
	return content, f.compare(int64(len(content)), digest(content))
}

// verify checks size and digest of a file without keeping its content.
func verify(root *os.Root, f File) error {
	file, _, err := openPlain(root, f.Path)
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // only read
	hash := sha256.New()
	size, err := io.Copy(hash, io.LimitReader(file, f.Size+1))
	if err != nil {
		return err
	}
	return f.compare(size, hex.EncodeToString(hash.Sum(nil)))
}

func (f File) compare(size int64, sum string) error {
	if size != f.Size {
		return fmt.Errorf("%s has %d bytes, the manifest says %d", f.Path, size, f.Size)
	}
	if sum != f.SHA256 {
		return fmt.Errorf("%s has SHA-256 %s, the manifest says %s", f.Path, sum, f.SHA256)
	}
	return nil
}

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}
