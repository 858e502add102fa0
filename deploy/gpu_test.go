package deploy

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The kit for a GPU machine is unpacked and its tests run there without a network: here on the CPU, in a network
// namespace without interfaces. make gpu-rehearsal does so with the whole kit.
func TestGPUKit(t *testing.T) {
	folder, kit, there := t.TempDir(), filepath.Join(t.TempDir(), "kit"), t.TempDir()
	code, runtime := filepath.Join(folder, "code"), filepath.Join(folder, "runtime")
	for _, dir := range []string{code + "/bin", code + "/scoring/ort", runtime + "/lib"} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	library := os.Getenv("ONNXRUNTIME_LIB")
	if library == "" {
		t.Fatal("ONNXRUNTIME_LIB is not set: run scripts/env go test")
	}
	shell(t, nil, "cp", library, runtime+"/lib/libonnxruntime.so.1")
	shell(t, nil, "cp", "-r", "../scoring/testdata", code+"/scoring/")
	shell(t, nil, "go", "test", "-c", "-o", code+"/bin/", "../scoring/ort")
	shell(t, nil, "cp", code+"/bin/ort.test", code+"/bin/scoring.test") // assemble looks for it
	shell(t, []string{"GPU_KIT=" + kit, "GPU_PART_MIB=4"}, "../scripts/gpu-kit", "pack", "runtime", runtime, "code", code)

	environment := []string{"GPU_DEVICE=cpu", "GPU_CHECK_DIR=" + there}
	check := func(args ...string) (string, error) {
		cmd := exec.Command("unshare", append([]string{"--map-root-user", "--net", kit + "/gpu-check"}, args...)...)
		cmd.Env = append(os.Environ(), environment...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	last := kit + "/code.tar.xz.00"
	content, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(last); err != nil {
		t.Fatal(err)
	}
	if out, err := check("assemble"); err != nil || !strings.Contains(out, "wait   code.tar.xz.00") {
		t.Errorf("without a part: %v\n%s", err, out)
	}
	if out, err := check("correct"); err == nil || !strings.Contains(out, "run gpu-check assemble") {
		t.Errorf("correct before all parts are there: %v\n%s", err, out)
	}
	if err := os.WriteFile(last, append(bytes.Clone(content[1:]), 0), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := check("assemble"); err == nil || !strings.Contains(out, last+" does not have digest") {
		t.Errorf("with a damaged part: %v\n%s", err, out)
	}
	if err := os.WriteFile(last, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := check("assemble"); err != nil || !strings.Contains(out, "all found") {
		t.Fatalf("with all parts: %v\n%s", err, out)
	}
	// The parts are not needed any more.
	for _, pattern := range []string{"runtime", "code"} {
		shell(t, nil, "sh", "-c", "rm "+kit+"/"+pattern+".tar.xz.*")
	}
	if out, err := check("run", "timed", "sessions", "60", "tests", "scoring/ort", "ort", "TestRows"); err != nil ||
		!strings.Contains(out, "ok     sessions") {
		t.Errorf("its tests: %v\n%s", err, out)
	}
	if out, _ := check("run", "timed", "nothing", "60", "tests", "scoring/ort", "ort", "TestThatIsNot"); !strings.Contains(
		out, "FAIL   nothing") {
		t.Errorf("a pattern that matches no test: %s", out)
	}
}

// shell runs a command.
func shell(t *testing.T, environment []string, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), environment...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// Of a library with kernels for several GPUs, one architecture's machine code is kept and everything else stays where
// it is.
func TestPruneFatbin(t *testing.T) {
	entry := func(kind uint16, arch uint32, code string) []byte {
		header := make([]byte, 64)
		binary.LittleEndian.PutUint16(header, kind)
		binary.LittleEndian.PutUint32(header[4:], uint32(len(header)))
		binary.LittleEndian.PutUint64(header[8:], uint64(len(code)))
		binary.LittleEndian.PutUint32(header[28:], arch)
		return append(header, code...)
	}
	fatbin := func(entries ...[]byte) []byte {
		header := make([]byte, 16)
		binary.LittleEndian.PutUint32(header, 0xBA55ED50)
		binary.LittleEndian.PutUint16(header[4:], 1)
		binary.LittleEndian.PutUint16(header[6:], 16)
		all := bytes.Join(entries, nil)
		binary.LittleEndian.PutUint64(header[8:], uint64(len(all)))
		return append(header, all...)
	}
	kernels := bytes.Join([][]byte{
		fatbin(entry(2, 80, "eighty.."), entry(2, 90, "ninety.."), entry(1, 90, "ptx.....")),
		make([]byte, 8),
		fatbin(entry(2, 90, "ninety2.")),
	}, nil)
	content := elfFile(kernels, "rest of the file")
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in.so"), filepath.Join(dir, "out.so")
	if err := os.WriteFile(in, content, 0o600); err != nil {
		t.Fatal(err)
	}
	shell(t, nil, "../scripts/prune-fatbin", in, out, "90")
	have, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.ReplaceAll(bytes.ReplaceAll(content, []byte("eighty.."), make([]byte, 8)), []byte("ptx....."),
		make([]byte, 8))
	if !bytes.Equal(have, want) {
		t.Errorf("%q, want %q", have, want)
	}
	if err := exec.Command("../scripts/prune-fatbin", in, out, "100").Run(); err == nil {
		t.Error("an architecture without kernels was accepted")
	}
}

// elfFile returns a 64-bit ELF file with a section .nv_fatbin.
func elfFile(kernels []byte, rest string) []byte {
	names := "\x00.nv_fatbin\x00"
	file := make([]byte, 64)
	copy(file, "\x7fELF\x02\x01")
	file = append(file, kernels...)
	file = append(file, rest...)
	text := len(file)
	file = append(file, names...)
	table := len(file)
	section := func(name uint32, offset, size int) {
		header := make([]byte, 64)
		binary.LittleEndian.PutUint32(header, name)
		binary.LittleEndian.PutUint64(header[24:], uint64(offset))
		binary.LittleEndian.PutUint64(header[32:], uint64(size))
		file = append(file, header...)
	}
	section(0, text, len(names))
	section(1, 64, len(kernels))
	binary.LittleEndian.PutUint64(file[0x28:], uint64(table))
	binary.LittleEndian.PutUint16(file[0x3c:], 2)
	binary.LittleEndian.PutUint16(file[0x3e:], 0)
	return file
}
