package pgtest

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
)

// Seed fills the database at url with scores of one model ("fashion-mnist", M = 5), evenly over the classes and the
// days before today, with the ledger, the rollups, and an alert and its review on one score in a hundred. It is
// deterministic except for the time of day. It works in SQL, so millions take minutes, not hours.
func Seed(t testing.TB, url string, scores, classes, days int) {
	t.Helper()
	ctx := t.Context()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	defer conn.Close(context.Background())
	for _, statement := range seed {
		if _, err := conn.Exec(ctx, statement, int64(scores), classes, days); err != nil {
			t.Fatalf("pgtest: seed: %v", err)
		}
	}
	if _, err := conn.Exec(ctx, `VACUUM ANALYZE`); err != nil {
		t.Fatalf("pgtest: seed: %v", err)
	}
}

// seed are statements with the numbers of scores, classes and days as parameters.
var seed = []string{
	`SELECT decuwatch.ensure_partition(date_trunc('month', now()) - m * interval '1 month')
		FROM pg_catalog.generate_series(0, $3::integer / 28 + 1) m WHERE $1 > 0 AND $2 > 0`,
	`INSERT INTO decuwatch.scores (event_time, source, event_id, ensemble_digest, model, settings, class_index,
		class_label,
		class_gap, class_gap_estimator, class_gap_upper_bound, class_gap_saturated, class_gap_mean_distance,
			class_gap_distances, class_gap_shares, class_gap_branch_step, class_gap_rollout_steps,
		request_risk, request_risk_estimator, request_risk_upper_bound, request_risk_saturated,
			request_risk_mean_distance, request_risk_distances, request_risk_shares, request_risk_branch_step,
			request_risk_rollout_steps,
		image_risk, image_risk_reason, image_risk_estimator, image_risk_top,
		profile, steps, guidance_scale, eta, seed, noise, carrier, unet_rows, runtime, device, deviations, labels,
			requested, scored_at)
	SELECT now() - i::float8 / $1 * $3 * interval '1 day', '//studio/render-' || i % 7, 'event-' || i, repeat('1', 64),
	'fashion-mnist', 'seeded', i % $2, 'class ' || i % $2,
		g, 'paide-w2', ln(5), false, g, d, s, 0, 1,
		r, 'mean-w2', 0, false, r, d, s, 10, 1,
		CASE WHEN i % $2 <> 1 THEN 30 * r END, CASE WHEN i % $2 = 1 THEN 'judge_cannot_tell' END,
			CASE WHEN i % $2 <> 1 THEN 'judge' END, CASE WHEN i % $2 <> 1 THEN '[]'::jsonb END,
		'fixed', 20, 2, 0, i, 'torch-cpu', i % 5, 40, 'onnxruntime 1.27.0', 'cpu', '{}',
		jsonb_build_object('tenant', 'tenant-' || i % 20, 'region',
			CASE i % 3 WHEN 0 THEN 'eu' WHEN 1 THEN 'us' ELSE 'ap' END),
		jsonb_build_object('class', i % $2), now() - i::float8 / $1 * $3 * interval '1 day'
	FROM (SELECT i, 0.02 + 0.1 * (i % $2) / $2 + 0.01 * (i * 7919 % 1000) / 1000.0 AS g,
	0.01 + 0.02 * (i * 104729 % 1000) / 1000.0 AS r,
			array_fill(0.01::float8 * (i % 97), ARRAY[5, 5]) AS d, array_fill(0.2::float8, ARRAY[5]) AS s
		FROM pg_catalog.generate_series(1, $1::bigint) i) x`,
	`INSERT INTO decuwatch.events (source, event_id, digest, outcome, reason, event_time, model, ensemble_digest,
		stream,
		sequence, delivered)
	SELECT source, event_id, repeat('0', 64), 'score', '', event_time, model, ensemble_digest, 'GENERATION',
	seed::bigint, 1 FROM decuwatch.scores WHERE $1 > 0 AND $2 > 0 AND $3 > 0`,
	`INSERT INTO decuwatch.alerts (id, kind, source, event_id, event_time, model, class_index, class_label, labels,
		severity, reason, measurement, value, decided, threshold,
		threshold_id, saturated, class_gap, request_risk, ensemble_digest, settings, receipt, count, detail, fired_at)
	SELECT md5(event_id), 'score', source, event_id, event_time, model, class_index, class_label, labels,
	CASE WHEN seed % 500 = 0 THEN 'critical' ELSE 'warn' END, 'class_threshold',
		'request_risk', request_risk, request_risk, 0.01, 0, false, class_gap, request_risk, ensemble_digest, settings,
			'{}', 0, '', scored_at
	FROM decuwatch.scores WHERE seed % 100 = 0 AND $1 > 0 AND $2 > 0 AND $3 > 0`,
	`INSERT INTO decuwatch.reviews (id, kind, alert_id, source, event_id, event_time, model, ensemble_digest,
		class_index, class_label, opened_at)
	SELECT id, 'alert', id, source, event_id, event_time, model, ensemble_digest, class_index, class_label, fired_at
	FROM decuwatch.alerts WHERE $1 > 0 AND $2 > 0 AND $3 > 0`,
	`INSERT INTO decuwatch.class_data (model, ensemble_digest, class_index, class_label, draws, class_gap, images,
		distinct_images, n_eff, near_duplicates, near_duplicate_groups, neighbor_label_share, likely_mislabeled, outliers,
		judge_accuracy, judge_held_out)
	SELECT 'fashion-mnist', repeat('1', 64), i, 'class ' || i, 4000, 0.1, 1000, 990, 12.5, 40, 9, 0.9, 31, 4,
		CASE WHEN i = 1 THEN 0.4 ELSE 0.9 END, 100
	FROM pg_catalog.generate_series(0, $2::integer - 1) i WHERE $1 > 0 AND $3 > 0`,
	`INSERT INTO decuwatch.class_hour_parts (hour, model, ensemble_digest, settings, class_index, class_label, n,
		class_gap_sum, class_gap_squares, class_gap_min, class_gap_max,
		class_gap_saturated, request_risk_sum, request_risk_squares, request_risk_min, request_risk_max,
			request_risk_saturated, warnings, criticals, folded,
			image_risk_n, image_risk_sum, image_risk_squares, image_risk_min, image_risk_max)
	SELECT date_trunc('hour', event_time, 'UTC'), model, ensemble_digest, settings, class_index, class_label, count(*),
	sum(class_gap), sum(class_gap * class_gap), min(class_gap), max(class_gap),
		0, sum(request_risk), sum(request_risk * request_risk), min(request_risk), max(request_risk), 0, count(*)
			FILTER (WHERE seed % 100 = 0 AND seed % 500 <> 0), count(*) FILTER (WHERE seed % 500 = 0), true,
		count(image_risk), coalesce(sum(image_risk), 0), coalesce(sum(image_risk * image_risk), 0), min(image_risk),
			max(image_risk)
	FROM decuwatch.scores WHERE $1 > 0 AND $2 > 0 AND $3 > 0 GROUP BY 1, 2, 3, 4, 5, 6`,
	`INSERT INTO decuwatch.class_day_parts
	SELECT date_trunc('day', hour, 'UTC'), model, ensemble_digest, settings, class_index, class_label, sum(n),
	sum(class_gap_sum), sum(class_gap_squares), min(class_gap_min), max(class_gap_max),
		sum(class_gap_saturated), sum(request_risk_sum), sum(request_risk_squares), min(request_risk_min),
			max(request_risk_max), sum(request_risk_saturated), sum(warnings), sum(criticals), true,
		sum(image_risk_n), sum(image_risk_sum), sum(image_risk_squares), min(image_risk_min), max(image_risk_max)
	FROM decuwatch.class_hour_parts WHERE $1 > 0 AND $2 > 0 AND $3 > 0 GROUP BY 1, 2, 3, 4, 5, 6`,
	`INSERT INTO decuwatch.outcome_hour_parts (hour, model, outcome, reason, n, folded)
	SELECT date_trunc('hour', event_time, 'UTC'), model, 'score', '', count(*), true FROM decuwatch.scores WHERE $1 > 0
	AND $2 > 0 AND $3 > 0 GROUP BY 1, 2`,
}
