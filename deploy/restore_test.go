package deploy

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
)

// site is a deployment whose parts can be lost one by one.
type site struct {
	t        *testing.T
	secrets  string
	nats     *server.Server
	postgres *local.Server
	worker   *exec.Cmd
	metrics  string
	js       jetstream.JetStream // of the operator
}

const tiny = "../scoring/testdata/tiny"

// newPostgres gives the site an empty cluster.
func (s *site) newPostgres() {
	s.t.Helper()
	db, err := local.Start(s.t.Context(), local.Options{Dir: filepath.Join(s.t.TempDir(), "postgres"), Remove: true,
		Settings: map[string]string{"fsync": "off"}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { db.Stop() }) // one that was lost is stopped already
	s.postgres = db
}

// address returns the database's address for a login of logins.sh.
func (s *site) address(user, file string) string {
	s.t.Helper()
	u, err := url.Parse(s.postgres.URL())
	if err != nil {
		s.t.Fatal(err)
	}
	password, err := os.ReadFile(filepath.Join(s.secrets, file))
	if err != nil {
		s.t.Fatal(err)
	}
	u.User = url.UserPassword(user, strings.TrimSpace(string(password)))
	return u.String()
}

// env are the variables of a program that runs as a user of NATS.
func (s *site) env(user string) []string {
	s.t.Helper()
	config, err := pgx.ParseConfig(s.postgres.URL())
	if err != nil {
		s.t.Fatal(err)
	}
	return append(os.Environ(),
		"PATH="+filepath.Dir(decuwatch(s.t))+":"+filepath.Dir(psql(s.t))+":"+os.Getenv("PATH"), "SECRETS="+s.secrets,
		"PGHOST="+config.Host, "PGPORT="+itoa(config.Port), "PGUSER="+config.User, "PGPASSWORD="+config.Password,
		"PGDATABASE="+config.Database,
		"DECUWATCH_POSTGRES_URL="+s.address("decuwatch_monitor", "postgres-writer"), "DECUWATCH_NATS_URL="+s.nats.ClientURL(),
		"DECUWATCH_NATS_NKEY="+filepath.Join(s.secrets, "nats-"+user+".nk"), "DECUWATCH_NATS_INBOX_PREFIX=_INBOX_"+user,
		"DECUWATCH_STREAM_MAX_BYTES=16777216", "DECUWATCH_ALERTS_MAX_BYTES=16777216", "DECUWATCH_SCORING_ENSEMBLES="+tiny,
		"DECUWATCH_METRICS_ADDRESS=127.0.0.1:0", "DECUWATCH_REVIEW_ADDRESS=127.0.0.1:0", "DECUWATCH_REVIEW_WORKERS=0")
}

// run runs a line of shell as a person would, and returns its output and exit code.
func (s *site) run(user, line string) (string, int) {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), "sh", "-c", line)
	cmd.Env = s.env(user)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		s.t.Fatalf("%s: %v", line, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// must is run of what must succeed.
func (s *site) must(user, line string) string {
	s.t.Helper()
	out, code := s.run(user, line)
	if code != 0 {
		s.t.Fatalf("%s: exit code %d: %s", line, code, out)
	}
	return out
}

// start starts a worker and waits until it is ready.
func (s *site) start() {
	s.t.Helper()
	log, err := os.CreateTemp(s.t.TempDir(), "worker")
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command(decuwatch(s.t), "serve")
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env("worker"), log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.worker = cmd
	output := func() string { out, _ := os.ReadFile(log.Name()); return string(out) }
	s.t.Cleanup(func() {
		s.stop()
		if s.t.Failed() {
			s.t.Logf("worker: %s", output())
		}
	})
	s.metrics = "http://" + listening(s.t, output, `metrics=http://([0-9.:]+)/metrics`)
	eventually(s.t, "the worker is ready", func() bool { return get(s.t.Context(), s.metrics+"/readyz") != "" })
}

// stop stops the worker in order.
func (s *site) stop() {
	if s.worker == nil {
		return
	}
	s.worker.Process.Signal(syscall.SIGTERM)
	if err := s.worker.Wait(); err != nil {
		s.t.Errorf("the worker ended with %v", err)
	}
	s.worker = nil
}

// publish publishes events of the tiny model, of a model that nobody serves, and payloads that are no events.
func (s *site) publish(from, known, unknown, broken int) {
	s.t.Helper()
	model := modelName(s.t, tiny+"/ensemble.json")
	for i := range known + unknown {
		e := schema.Event{Source: "//shop", ID: strconv.Itoa(from + i), Time: time.Now().UTC(),
			Data: schema.Generation{Model: model, Class: schema.ClassIndex(0), Seed: uint64(from + i)}}
		if i >= known {
			e.Data.Model = "nobody"
		}
		if _, err := schema.Publish(s.t.Context(), s.js, e); err != nil {
			s.t.Fatal(err)
		}
	}
	for i := range broken {
		if _, err := s.js.Publish(s.t.Context(), schema.SubjectGeneration(model),
			[]byte(fmt.Sprint("no event ", from+i))); err != nil {
			s.t.Fatal(err)
		}
	}
}

// settled waits until Postgres has these numbers of scores and dead letters, and every pending alert was delivered.
func (s *site) settled(scores, letters int) {
	s.t.Helper()
	conn := connect(s.t, s.postgres.URL())
	eventually(s.t, fmt.Sprintf("%d scores, %d dead letters", scores, letters), func() bool {
		var got [3]int
		err := conn.QueryRow(s.t.Context(), `SELECT (SELECT count(*) FROM decuwatch.scores),
			(SELECT count(*) FROM decuwatch.dead_letters),
			(SELECT count(*) FROM decuwatch.outbox WHERE delivered_at IS NULL)`).Scan(&got[0], &got[1], &got[2])
		return err == nil && got == [3]int{scores, letters, 0}
	})
}

// lines returns the rows of a query of one text column.
func (s *site) lines(sql string) []string {
	s.t.Helper()
	rows, err := connect(s.t, s.postgres.URL()).Query(s.t.Context(), sql)
	if err != nil {
		s.t.Fatal(err)
	}
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		s.t.Fatal(err)
	}
	return found
}

// published returns the ids in the stream of alerts, in order.
func (s *site) published() []string {
	s.t.Helper()
	stream, err := s.js.Stream(s.t.Context(), "UNCERTAINTY")
	if err != nil {
		s.t.Fatal(err)
	}
	info, err := stream.Info(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	var ids []string
	for sequence := info.State.FirstSeq; sequence <= info.State.LastSeq; sequence++ {
		m, err := stream.GetMsg(s.t.Context(), sequence)
		if err != nil {
			s.t.Fatal(err)
		}
		ids = append(ids, m.Header.Get(nats.MsgIdHdr))
	}
	slices.Sort(ids)
	return ids
}

// documented returns the commands of a section of docs/operating.md.
func documented(t *testing.T, heading string) []string {
	t.Helper()
	content, err := os.ReadFile("../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(content), "\n"+heading+"\n")
	if !found {
		t.Fatalf("docs/operating.md has no section %s", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var commands []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(section, -1) {
		for line := range strings.Lines(block[1]) {
			if line, _, _ = strings.Cut(strings.TrimSpace(line), " # "); line != "" && !strings.HasPrefix(line, "#") {
				commands = append(commands, strings.TrimSpace(line))
			}
		}
	}
	return commands
}

// TestBackupAndRestore loses Postgres, and the stream of alerts, and brings both back by the commands of
// docs/operating.md.
func TestBackupAndRestore(t *testing.T) {
	s := &site{t: t, secrets: secrets(t)}
	s.nats = startNATS(t, s.secrets)
	operator, _ := as(t, s.nats, s.secrets, "operator")
	js, err := jetstream.New(operator)
	if err != nil {
		t.Fatal(err)
	}
	s.js = js
	s.newPostgres()
	s.must("operator", "sh postgres/logins.sh")
	s.must("operator", "decuwatch migrate --postgres.url "+s.address("decuwatch_owner", "postgres-owner"))
	s.must("operator",
		"decuwatch thresholds set "+tiny+" --measurement=class_gap --limit --value=-1000 --reason=test --by=test")
	s.start()
	s.publish(0, 12, 2, 1)
	s.settled(12, 3)

	commands := documented(t, "## Back up and restore")
	dump := filepath.Join(t.TempDir(), "decuwatch.dump")
	step := func(command string) string {
		t.Helper()
		if len(commands) == 0 || commands[0] != command {
			t.Fatalf("the next documented command is %q, want %q", commands[:min(1, len(commands))], command)
		}
		commands = commands[1:]
		command = strings.NewReplacer("decuwatch.dump", dump, "deploy/postgres/", "postgres/").Replace(command)
		return s.must("operator", command)
	}
	step("deploy/postgres/backup.sh >decuwatch.dump")
	const verdicts = `SELECT row_to_json(s)::text FROM decuwatch.scores s ORDER BY event_id`
	const rights = `SELECT relname || coalesce(relacl::text, '') FROM pg_catalog.pg_class WHERE relnamespace IN (SELECT oid
		FROM pg_catalog.pg_namespace WHERE nspname LIKE 'decuwatch%')
		UNION ALL SELECT proname || coalesce(proacl::text, '') || proowner::regrole FROM pg_catalog.pg_proc
			WHERE pronamespace = 'decuwatch'::regnamespace ORDER BY 1`
	old, may := s.lines(verdicts), s.lines(rights)

	// More events come, and Postgres is lost with their verdicts, and NATS with the alerts.
	s.publish(100, 6, 2, 1)
	s.settled(18, 6)
	alerts := s.published()
	if len(alerts) != 18 {
		t.Fatalf("%d alerts are published, want 18", len(alerts))
	}
	s.stop()
	if err := s.postgres.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteStream(t.Context(), "UNCERTAINTY"); err != nil {
		t.Fatal(err)
	}
	s.newPostgres()
	step("deploy/postgres/restore.sh <decuwatch.dump")
	if out, code := s.run("operator", "sh postgres/restore.sh <"+dump); code == 0 ||
		!strings.Contains(out, "holds decuwatch's tables already") {
		t.Errorf("a second restore: exit code %d, %s", code, out)
	}
	if now := s.lines(rights); !slices.Equal(now, may) {
		t.Errorf("rights before:\n%s\nrights after:\n%s", strings.Join(may, "\n"), strings.Join(now, "\n"))
	}
	if again := s.lines(verdicts); !slices.Equal(again, old) {
		t.Error("the restored scores are others")
	}
	step("decuwatch migrate status")
	s.redeliver(step)
	s.start()
	s.settled(18, 6)
	now := s.lines(verdicts)
	for _, row := range old {
		if !slices.Contains(now, row) {
			t.Errorf("a score was made again: %s", row)
		}
	}
	scored := regexp.MustCompile(`(?m)^decuwatch_events_total\{[^}]*outcome="score"[^}]*\} (\d+)$`).
		FindStringSubmatch(get(t.Context(), s.metrics+"/metrics"))
	if scored == nil || scored[1] != "6" {
		t.Errorf("scored after the restore: %q, want the 6 events that Postgres did not know", scored)
	}
	if out, code := s.run("operator", "decuwatch republish"); code != 3 ||
		!strings.Contains(out, "12 messages are missing") {
		t.Errorf("exit code %d: %s", code, out)
	}
	step("decuwatch republish --apply")
	eventually(t, "every alert is published again", func() bool { return slices.Equal(s.published(), alerts) })
	step("decuwatch reconcile")
	if out := s.must("operator", "decuwatch republish"); !strings.Contains(out, "nothing is missing") {
		t.Error(out)
	}
	if len(commands) > 0 {
		t.Errorf("documented and not run: %q", commands)
	}
	s.stop()
}

// redeliver has every message of the stream delivered again.
func (s *site) redeliver(func(string) string) {
	s.t.Helper()
	stream, err := s.js.Stream(s.t.Context(), "GENERATION")
	if err != nil {
		s.t.Fatal(err)
	}
	names := stream.ConsumerNames(s.t.Context())
	for name := range names.Name() {
		if err := stream.DeleteConsumer(s.t.Context(), name); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := names.Err(); err != nil {
		s.t.Fatal(err)
	}
}
