package postgres_test

import (
	"database/sql"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver of goose
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// oldScore writes the score of an event as a program of the first version does.
const oldScore = `INSERT INTO decuwatch.scores (event_time, source, event_id, ensemble_digest, model, settings,
			class_index, class_label, class_gap, class_gap_estimator, class_gap_upper_bound, class_gap_saturated,
			class_gap_mean_distance, class_gap_distances, class_gap_shares, class_gap_branch_step, class_gap_rollout_steps,
			request_risk, request_risk_estimator, request_risk_upper_bound, request_risk_saturated,
			request_risk_mean_distance, request_risk_distances, request_risk_shares, request_risk_branch_step,
			request_risk_rollout_steps, profile, steps, guidance_scale, eta, seed, noise, carrier, unet_rows, runtime, device,
			deviations, labels, requested, scored_at)
		SELECT event_time, source, event_id, ensemble_digest, model, 'ddim', 1, 'one', 0.1, 'paide-w2', 1, false, 0.3,
			'{}', '{}', 0, 1, 0.2, 'mean-w2', 0, false, 0.4, '{}', '{}', 10, 1, 'fixed', 20, 2, 0, 7, 'torch-cpu', 0, 40,
			'r', 'cpu', '{}', '{}', '{"class": 1}', now()
		FROM decuwatch.events WHERE outcome = 'score' AND event_id = $1`

// TestUpgrade brings tables of the first version, with rows in them, to the newest.
func TestUpgrade(t *testing.T) {
	url := pgtest.EmptyURL(t)
	conn := connect(t, url)
	ctx := testContext(t)
	first := fstest.MapFS{}
	for _, file := range []string{"00001_tables.sql", "00002_review.sql", "00003_views.sql", "00100_review_job.sql"} {
		content, err := os.ReadFile("migrations/" + file)
		if err != nil {
			t.Fatal(err)
		}
		first[file] = &fstest.MapFile{Data: content}
	}
	db, err := sql.Open("pgx", url)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := conn.Exec(ctx, `CREATE SCHEMA decuwatch`); err != nil {
		t.Fatal(err)
	}
	p, err := goose.NewProvider(database.DialectPostgres, db, first, goose.WithTableName("decuwatch.migrations"),
		goose.WithDisableGlobalRegistry(true))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Up(ctx); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`INSERT INTO decuwatch.dead_letters (stream, sequence, digest, delivered, subject, payload, kind, field, reason)
			VALUES ('s', 1, repeat('0', 64), 1, '', 'old', 'invalid', '', 'r')`,
		`INSERT INTO decuwatch.events (source, event_id, digest, outcome, reason, event_time, model, stream, sequence,
			delivered) VALUES ('s', 'old', repeat('0', 64), 'skip', 'noise', now(), 'm', 's', 2, 1)`,
		`INSERT INTO decuwatch.events (source, event_id, digest, outcome, reason, event_time, model, stream, sequence,
			delivered)
			VALUES ('s', 'open', repeat('1', 64), 'dead_letter', 'unknown_model', now(), 'm', 's', 4, 1)`,
		`INSERT INTO decuwatch.dead_letters (stream, sequence, digest, delivered, source, event_id, event_time, model,
			subject, payload, kind, field, reason)
			VALUES ('s', 4, repeat('1', 64), 1, 's', 'open', now(), 'm', 'generation.requested.m', 'p', 'unknown_model', '',
			'r')`,
		`SELECT decuwatch.ensure_partition(now())`,
		`INSERT INTO decuwatch.events (source, event_id, digest, outcome, reason, event_time, model, ensemble_digest,
			stream, sequence, delivered)
			SELECT 's', id, repeat('3', 64), 'score', '', now(), 'm', repeat('1', 64), 's', 6, 1
			FROM unnest(ARRAY['scored', 'late']) id`,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Exec(ctx, oldScore, "scored"); err != nil {
		t.Fatal(err)
	}
	if _, err := postgres.Open(ctx, postgres.Config{URL: url}); err == nil ||
		!strings.Contains(err.Error(), "decuwatch migrate") {
		t.Errorf("opened older tables: %v", err)
	}
	if err := postgres.Migrate(ctx, url); err != nil {
		t.Fatal(err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.migration_hashes WHERE version_id <= 100`); n != len(first) {
		t.Errorf("%d hashes of the %d migrations that were there", n, len(first))
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.dead_letters WHERE payload_text = 'old'
		AND payload_bytes = 3 AND payload_state = 'whole'`); n != 1 {
		t.Errorf("%d old dead letters", n)
	}
	// Ids belong to one model each, and events that no worker took are open.
	got := list(t, conn, `SELECT event_id FROM decuwatch.events ORDER BY 1`)
	if !slices.Equal(got, []string{"late", "old", "scored"}) {
		t.Errorf("events are %v", got)
	}
	if _, err := conn.Exec(ctx, `INSERT INTO decuwatch.events (source, event_id, digest, outcome, reason, event_time,
		model, stream, sequence, delivered)
		VALUES ('s', 'old', repeat('2', 64), 'skip', 'noise', now(), 'n', 's', 5, 1)`); err != nil {
		t.Error(err)
	}
	// A program of the first version still writes while workers are replaced.
	if _, err := conn.Exec(ctx, `INSERT INTO decuwatch.dead_letters (stream, sequence, digest, delivered, subject,
		payload, kind, field, reason) VALUES ('s', 3, repeat('0', 64), 1, '', 'x', 'invalid', '', 'r')`); err != nil {
		t.Error(err)
	}
	if _, err := conn.Exec(ctx, oldScore, "late"); err != nil {
		t.Error(err)
	}
	// Older scores have no image risk and no reason, and were measured as all scores were then.
	s, err := postgres.Open(ctx, postgres.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, id := range []string{"scored", "late"} {
		score, err := s.ScoreByID(ctx, schema.Identity{Source: "s", ID: id, Model: "m"})
		if err != nil {
			t.Fatal(err)
		}
		if score.ImageRisk != nil || score.ImageRiskReason != "" {
			t.Errorf("%s has the image risk %v, reason %q", id, score.ImageRisk, score.ImageRiskReason)
		}
		for _, m := range score.Measurements() {
			if m.Tables != "members" || m.Guidance != "own" || m.Steps != 20 {
				t.Errorf("%s: %s is of %q, guidance %q, %d steps", id, m.Name, m.Tables, m.Guidance, m.Steps)
			}
		}
	}
	works(t, url)
}
