package deploy

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
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
		project := compose(t, profile, "alerting", "canary")
		for _, name := range []string{"nats", "postgres", "migrate", worker, "prometheus", "grafana", "alertmanager",
			"canary"} {
			if _, ok := project.Services[name]; !ok {
				t.Errorf("%s: no service %s", profile, name)
			}
		}
		for name, s := range project.Services {
			checkHardened(t, name, s)
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
				if secret.Source == "alert-webhook" {
					continue // the operator's own
				}
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
		if ports := project.Services[worker].Ports; len(ports) != 1 || !strings.Contains(ports[0].Published, "-") {
			t.Errorf("%s: ports %v, must be a range, for more workers than one", worker, ports)
		}
		if _, ok := project.Services[worker].Networks["default"]; !ok {
			t.Errorf("%s has no network", worker)
		} else if aliases := project.Services[worker].Networks["default"].Aliases; len(aliases) != 1 ||
			aliases[0] != "decuwatch" {
			t.Errorf("%s: aliases %q, prometheus.yml looks up decuwatch", worker, aliases)
		}
	}
}

// pinned is an image by version and digest. The program's own are built here.
var pinned = regexp.MustCompile(`:v?\d+\.\d+(\.\d+)?(-[a-z0-9]+)?@sha256:[0-9a-f]{64}$|^decuwatch:(cpu|cuda)$`)

// undigested are images whose digest nobody has looked up yet: make pin-images writes it.
var undigested = []string{"nats:2.15.2-alpine"}

// checkHardened wants every service to be pinned, bounded, and without rights that it does not need.
func checkHardened(t *testing.T, name string, s types.ServiceConfig) {
	t.Helper()
	if !pinned.MatchString(s.Image) && !slices.Contains(undigested, s.Image) {
		t.Errorf("%s: image %s is not pinned by version and digest", name, s.Image)
	}
	if !s.ReadOnly || !slices.Equal(s.CapDrop, []string{"ALL"}) || len(s.CapAdd) > 0 && name != "postgres" ||
		!slices.Equal(s.SecurityOpt, []string{"no-new-privileges:true"}) || s.Privileged {
		t.Errorf("%s: may write to its image, has capabilities, or may gain them", name)
	}
	if s.MemLimit <= 0 {
		t.Errorf("%s: no memory limit", name)
	}
	if s.Logging == nil || s.Logging.Options["max-size"] == "" || s.Logging.Options["max-file"] == "" {
		t.Errorf("%s: its log grows without bound: %+v", name, s.Logging)
	}
}

// TestVersionsAgree holds a version that is written in several places to one value.
func TestVersionsAgree(t *testing.T) {
	find := func(path, pattern string) string {
		t.Helper()
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(pattern).FindSubmatch(content)
		if found == nil {
			t.Fatalf("%s: nothing is like %s", path, pattern)
		}
		return string(found[1])
	}
	for image, other := range map[string]struct{ path, pattern string }{
		"grafana/grafana":   {"grafana/types/package.json", `"@grafana/schema": "([^"]+)"`},
		"nats":              {"../go.mod", `nats-io/nats-server/v2 v(\S+)`},
		"prom/alertmanager": {"check/fetch-go-tools", ` alertmanager=v(\S+)`},
	} {
		runs := find("../docker-compose.yml", `image: `+image+`:v?([0-9.]+)`)
		if tested := find(other.path, other.pattern); tested != runs {
			t.Errorf("docker-compose.yml runs %s %s, and %s has %s", image, runs, other.path, tested)
		}
	}
	if a, b := find("check/cluster-check", `kwok_version=(\S+)`), find("check/fetch-go-tools", ` kwok=(\S+)`); a != b {
		t.Errorf("the stages are kwok's %s, and the program is %s", a, b)
	}
}

// TestComposeBuildsTheirVersion wants every image that Compose builds to know what it is built from.
func TestComposeBuildsTheirVersion(t *testing.T) {
	options, err := cli.NewProjectOptions([]string{"../docker-compose.yml"}, cli.WithProfiles([]string{"*"}),
		cli.WithEnv([]string{"VERSION=v1.2.3", "REVISION=0123abc"}))
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	builds := 0
	for name, s := range project.Services {
		if s.Build == nil {
			continue
		}
		builds++
		version, revision := s.Build.Args["VERSION"], s.Build.Args["REVISION"]
		if version == nil || *version != "v1.2.3" || revision == nil || *revision != "0123abc" {
			t.Errorf("%s is built as %v, %v", name, version, revision)
		}
	}
	if builds != 4 {
		t.Errorf("%d services are built, want 4", builds)
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
	if minor == nil || !strings.Contains(text, "golang:"+string(minor[1])+".") {
		t.Errorf("the Dockerfile's Go is not the module's: %s", minor)
	}
	for _, m := range regexp.MustCompile(`(?m)^FROM (\S+)`).FindAllStringSubmatch(text, -1) {
		name, ok := strings.CutPrefix(m[1], "$")
		if !ok || !regexp.MustCompile(`(?m)^ARG `+name+`=\S+:\S+@sha256:[0-9a-f]{64}$`).MatchString(text) {
			t.Errorf("FROM %s: the base image has no argument that pins it by digest", m[1])
		}
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
	run := func() {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "sh", "postgres/logins.sh")
		cmd.Env = append(os.Environ(), "SECRETS="+dir, "PGHOST="+config.Host, "PGPORT="+itoa(config.Port),
			"PGUSER="+config.User,
			"PGPASSWORD="+config.Password, "PGDATABASE="+config.Database, "PATH="+filepath.Dir(psql)+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
			t.Fatalf("%v: %s", err, out)
		}
	}
	address := func(user, file string) string {
		password, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		return pgtest.As(t, url, user, strings.TrimSpace(string(password)))
	}
	run()
	run()
	// Tables that the administrator has made, as deployments of older versions did, become decuwatch_owner's. It can then
	// do all that migrations do.
	if err := postgres.Migrate(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	run()
	owner := address("decuwatch_owner", "postgres-owner")
	if err := postgres.MigrateDown(t.Context(), owner); err != nil {
		t.Fatalf("tables of the administrator: %v", err)
	}
	if err := postgres.Migrate(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	var super bool
	if err := connect(t, owner).QueryRow(t.Context(), `SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls
		FROM pg_catalog.pg_roles WHERE rolname = current_user`).Scan(&super); err != nil || super {
		t.Errorf("the owner of the tables is more than that: %t, %v", super, err)
	}
	login := func(user, file string) *pgx.Conn { return connect(t, address(user, file)) }
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
