package deploy

import (
	"archive/tar"
	"archive/zip"
	"compress/gzip"
	"crypto/sha256"
	object "debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// command runs a command in the root of the repository and returns what it prints.
func command(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Env = "..", append(os.Environ(), env...)
	out, err := cmd.Output()
	if err != nil {
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			t.Fatalf("%s: %v: %s", name, err, failed.Stderr)
		}
		t.Fatalf("%s: %v", name, err)
	}
	return strings.TrimSpace(string(out))
}

// TestRelease builds a release for this machine's architecture: the program says the version of git and needs nothing
// but libc, the SBOM lists what it was built from, the wheel has the same version, and the checksums are right.
func TestRelease(t *testing.T) {
	dir := t.TempDir()
	command(t, []string{"OUT=" + dir, "ARCHES=" + runtime.GOARCH}, "scripts/release")
	version := command(t, nil, "git", "describe", "--tags", "--always", "--dirty", "--match", "v[0-9]*")
	revision := command(t, nil, "git", "rev-parse", "HEAD")
	name := "decuwatch_" + version + "_linux_" + runtime.GOARCH

	sums, err := os.ReadFile(filepath.Join(dir, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]bool{}
	for line := range strings.Lines(string(sums)) {
		sum, file, _ := strings.Cut(strings.TrimSpace(line), "  ")
		content, err := os.ReadFile(filepath.Join(dir, file))
		if got := sha256.Sum256(content); err != nil || hex.EncodeToString(got[:]) != sum {
			t.Errorf("%s: SHA-256 %x, the sums say %s: %v", file, got, sum, err)
		}
		files[file] = true
	}
	wheels, err := filepath.Glob(filepath.Join(dir, "decuwatch_training-*.whl"))
	if err != nil || len(wheels) != 1 || len(files) != 3 || !files[name+".tar.gz"] || !files[name+".cdx.json"] {
		t.Fatalf("the release has %v, and the wheels %v: %v", files, wheels, err)
	}
	released(t, filepath.Join(dir, name+".tar.gz"), name, version, revision)
	materials(t, filepath.Join(dir, name+".cdx.json"), version)
	wheel(t, wheels[0], version)
}

// released unpacks the program and runs it.
func released(t *testing.T, path, name, version, revision string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "decuwatch")
	var names []string
	for packed := tar.NewReader(unzipped); ; {
		header, err := packed.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name)
		if header.Name != name+"/decuwatch" {
			continue
		}
		content, err := io.ReadAll(packed)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(binary, content, 0o755); err != nil { //nolint:gosec // it runs
			t.Fatal(err)
		}
	}
	if want := []string{name + "/", name + "/CHANGELOG.md", name + "/LICENSE", name + "/decuwatch"}; !slices.Equal(names,
		want) {
		t.Errorf("%s has %v, want %v", path, names, want)
	}
	says := command(t, nil, binary, "--version")
	if want := "decuwatch " + version + " (" + revision[:12] + ")"; !strings.HasPrefix(says, want) {
		t.Errorf("the program says %q, want %q", says, want)
	}
	file, err := object.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	libraries, err := file.ImportedLibraries()
	for _, library := range libraries {
		if !slices.Contains([]string{"libc.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-aarch64.so.1",
			"ld-linux-x86-64.so.2"}, library) {
			t.Errorf("the program needs %s", library)
		}
	}
	if err != nil {
		t.Error(err)
	}
}

// materials holds the SBOM against go.mod.
func materials(t *testing.T, path, version string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	type component struct{ Name, Version string }
	var sbom struct {
		BOMFormat  string
		Metadata   struct{ Component component }
		Components []component
	}
	if err := json.Unmarshal(content, &sbom); err != nil {
		t.Fatal(err)
	}
	if sbom.BOMFormat != "CycloneDX" || sbom.Metadata.Component.Name != "github.com/decuwatch/decuwatch" ||
		sbom.Metadata.Component.Version != version {
		t.Errorf("the SBOM is of %s %+v", sbom.BOMFormat, sbom.Metadata.Component)
	}
	for _, module := range []string{"github.com/nats-io/nats.go", "github.com/jackc/pgx/v5",
		"github.com/yalue/onnxruntime_go"} {
		want := component{module, command(t, nil, "go", "list", "-m", "-f", "{{.Version}}", module)}
		if !slices.Contains(sbom.Components, want) {
			t.Errorf("the SBOM does not list %+v", want)
		}
	}
}

// wheel looks into the Python wheel.
func wheel(t *testing.T, path, version string) {
	t.Helper()
	z, err := zip.OpenReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	read := func(suffix string) string {
		for _, f := range z.File {
			if strings.HasSuffix(f.Name, suffix) {
				r, err := f.Open()
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				content, err := io.ReadAll(r)
				if err != nil {
					t.Fatal(err)
				}
				return string(content)
			}
		}
		t.Errorf("%s has no %s", path, suffix)
		return ""
	}
	commit, _, _ := strings.Cut(version, "-dirty")
	metadata := read(".dist-info/METADATA")
	if !strings.Contains(metadata, "\nVersion: ") || !strings.HasPrefix(version, "v") && !strings.Contains(metadata,
		"\nVersion: 0.0.0+g"+commit) {
		t.Errorf("the wheel's version is not %s: %.300s", version, metadata)
	}
	if entry := read(".dist-info/entry_points.txt"); !strings.Contains(entry, "decuwatch-train = ") {
		t.Errorf("the wheel's entry points are %s", entry)
	}
	read("decuwatch_training/cli.py")
}
