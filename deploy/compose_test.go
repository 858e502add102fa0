package deploy

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// settings returns the environment variables that the program reads: docs/configuration.md is made from the program's
// configuration, and a test of internal/app checks that it is complete.
func settings(t *testing.T) map[string]bool {
	t.Helper()
	content, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^- \\*\\*`[^`]+`\\*\\* \\(`(DECUWATCH_\\w+)`,").
		FindAllStringSubmatch(string(content), -1) {
		known[m[1]] = true
	}
	if len(known) < 30 {
		t.Fatalf("%d settings in docs/configuration.md", len(known))
	}
	return known
}

func compose(t *testing.T, profiles ...string) *types.Project {
	t.Helper()
	options, err := cli.NewProjectOptions([]string{"../docker-compose.yml"}, cli.WithProfiles(profiles))
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return project
}

// TestCompose holds docker-compose.yml against the files it mounts, the program's settings and the secrets that the
// command makes.
func TestCompose(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	made := secrets(t)
	known := settings(t)
	for profile, worker := range map[string]string{"cpu": "decuwatch-cpu", "gpu": "decuwatch-gpu"} {
		project := compose(t, profile)
		for _, name := range []string{"nats", "postgres", "migrate", worker, "prometheus", "grafana"} {
			if _, ok := project.Services[name]; !ok {
				t.Errorf("%s: no service %s", profile, name)
			}
		}
		for name, s := range project.Services {
			if !regexp.MustCompile(`:v?\d+\.\d+\.\d+(-[a-z]+)?$|:v?\d+\.\d+-[a-z]+$|^decuwatch:(cpu|cuda)$`).
				MatchString(s.Image) {
				t.Errorf("%s: image %s is not pinned by version", name, s.Image)
			}
			if s.HealthCheck == nil && name != "migrate" {
				t.Errorf("%s has no health check", name)
			}
			for _, p := range s.Ports {
				if p.HostIP != "127.0.0.1" {
					t.Errorf("%s: port %s is published on %q", name, p.Published, p.HostIP)
				}
			}
			for _, v := range s.Volumes {
				switch v.Type {
				case types.VolumeTypeVolume:
					if _, ok := project.Volumes[v.Source]; !ok {
						t.Errorf("%s: no volume %s", name, v.Source)
					}
				case types.VolumeTypeBind:
					if !v.ReadOnly {
						t.Errorf("%s: %s is mounted for writing", name, v.Source)
					}
					path := v.Source
					if rest, ok := strings.CutPrefix(path, filepath.Join(root, "deploy/.secrets")); ok {
						path = made + rest
					}
					if _, err := os.Stat(path); err != nil {
						t.Errorf("%s: %v", name, err)
					}
				}
			}
			mounted := map[string]bool{}
			for _, secret := range s.Secrets {
				file := project.Secrets[secret.Source].File
				rest, ok := strings.CutPrefix(file, filepath.Join(root, "deploy/.secrets"))
				if !ok {
					t.Errorf("%s: secret %s is %s", name, secret.Source, file)
				}
				if _, err := os.Stat(made + rest); err != nil {
					t.Errorf("%s: deploy/secrets does not make %s", name, secret.Source)
				}
				mounted["/run/secrets/"+secret.Source] = true
			}
			for variable, value := range s.Environment {
				if strings.HasPrefix(variable, "DECUWATCH_") && !known[variable] {
					t.Errorf("%s: the program does not read %s", name, variable)
				}
				for _, path := range regexp.MustCompile(`/run/secrets/[\w.-]+`).FindAllString(*value, -1) {
					if !mounted[path] {
						t.Errorf("%s: %s names %s, which is not mounted", name, variable, path)
					}
				}
				if strings.Contains(variable, "PASSWORD") && !strings.HasPrefix(*value, "/run/secrets/") {
					t.Errorf("%s: %s holds a secret", name, variable)
				}
			}
			if s.Build != nil {
				dockerfile, err := os.ReadFile(filepath.Join(root, s.Build.Dockerfile))
				if err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(string(dockerfile), " AS "+s.Build.Target+"\n") {
					t.Errorf("%s: deploy/Dockerfile has no target %s", name, s.Build.Target)
				}
			}
		}
		if s := project.Services[worker]; !s.ReadOnly || len(s.CapDrop) != 1 || s.CapDrop[0] != "ALL" {
			t.Errorf("%s: may write or has capabilities", worker)
		}
		if _, ok := project.Services[worker].Networks["default"]; !ok {
			t.Errorf("%s has no network", worker)
		} else if aliases := project.Services[worker].Networks["default"].Aliases; len(aliases) != 1 ||
			aliases[0] != "decuwatch" {
			t.Errorf("%s: aliases %q, prometheus.yml scrapes decuwatch:9464", worker, aliases)
		}
	}
}

var copied = regexp.MustCompile(`(?m)^COPY ([a-z][^-].*) \S+$`)

// TestDockerfile checks what can be checked without a Docker engine: what is copied exists, the versions are those of
// the module and of the script, and no stage that is run is root's.
func TestDockerfile(t *testing.T) {
	content, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	for _, m := range copied.FindAllStringSubmatch(text, -1) {
		for _, path := range strings.Fields(m[1]) {
			if _, err := os.Stat(filepath.Join("..", path)); err != nil {
				t.Error(err)
			}
		}
	}
	script, err := os.ReadFile("../scripts/fetch-onnxruntime")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`(?m)^version=(\S+)$`).FindSubmatch(script)
	if version == nil || !strings.Contains(text, "onnxruntime-gpu=="+string(version[1])+" ") ||
		!strings.Contains(text, ".tools/onnxruntime-"+string(version[1])+"/") {
		t.Errorf("the Dockerfile's ONNX Runtime is not the script's: %s", version)
	}
	module, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	minor := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindSubmatch(module)
	if minor == nil || !strings.Contains(text, "golang:"+string(minor[1])+"-") {
		t.Errorf("the Dockerfile's Go is not the module's: %s", minor)
	}
	for _, target := range []string{"cpu", "cuda"} {
		_, stage, ok := strings.Cut(text, " AS "+target+"\n")
		if !ok {
			t.Fatalf("no target %s", target)
		}
		stage, _, _ = strings.Cut(stage, "\nFROM ")
		if !strings.Contains(stage, "\nUSER 10001:10001\n") || !strings.Contains(stage, "DECUWATCH_ONNXRUNTIME_LIB=") {
			t.Errorf("%s: runs as root, or does not name its library", target)
		}
	}
}

// TestPostgresLogins runs the script that makes the logins, twice, before the migrations, as the Postgres image does.
// Then each has its rights and no more.
func TestPostgresLogins(t *testing.T) {
	psql := psql(t)
	dir := secrets(t)
	url := pgtest.EmptyURL(t)
	config, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		cmd := exec.CommandContext(t.Context(), "sh", "postgres/logins.sh")
		cmd.Env = append(os.Environ(), "SECRETS="+dir, "PGHOST="+config.Host, "PGPORT="+itoa(config.Port),
			"PGUSER="+config.User,
			"PGPASSWORD="+config.Password, "PGDATABASE="+config.Database, "PATH="+filepath.Dir(psql)+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if err := postgres.Migrate(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	login := func(user, file string) *pgx.Conn {
		password, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		return connect(t, pgtest.As(t, url, user, strings.TrimSpace(string(password))))
	}
	grafana, worker := login("decuwatch_grafana", "postgres-reader"), login("decuwatch_monitor", "postgres-writer")
	for _, c := range []struct {
		conn *pgx.Conn
		sql  string
		may  bool
	}{
		{grafana, `SELECT count(*) FROM decuwatch_views.scores`, true},
		{grafana, `SELECT count(*) FROM decuwatch.scores`, false},
		{grafana, `CREATE TEMPORARY TABLE mine (i integer)`, false},
		{worker, `SELECT count(*) FROM decuwatch.scores`, true},
		{worker, `INSERT INTO decuwatch.threshold_changes (kind, set_by, reason) VALUES ('manual', 'test', '')`, true},
		{worker, `UPDATE decuwatch.scores SET class_gap = 0`, false},
		{worker, `DELETE FROM decuwatch.thresholds`, false},
		{worker, `DROP TABLE decuwatch.alerts`, false},
		{worker, `CREATE TABLE decuwatch.mine (i integer)`, false},
	} {
		if _, err := c.conn.Exec(t.Context(), c.sql); (err == nil) != c.may {
			t.Errorf("%s: %s: %v", c.conn.Config().User, c.sql, err)
		}
	}
	// The monitor opens the store as its own login, with what its role may do.
	store, err := postgres.Open(context.Background(), postgres.Config{URL: worker.Config().ConnString()})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := store.EnsurePartitions(t.Context(), 2); err != nil {
		t.Error(err)
	}
}

func itoa(port uint16) string { return strconv.Itoa(int(port)) }

// psql returns the path of psql, which comes with the server.
func psql(t *testing.T) string {
	t.Helper()
	if path, err := exec.LookPath("psql"); err == nil {
		return path
	}
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin/psql",
		"../.tools/postgresql/usr/lib/postgresql/*/bin/psql"} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			path, err := filepath.Abs(found[len(found)-1])
			if err != nil {
				t.Fatal(err)
			}
			return path
		}
	}
	t.Fatal("psql is missing (run: make setup)")
	return ""
}
