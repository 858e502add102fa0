package postgres_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

func garbled(sequence uint64, kind schema.DeadLetterKind, payload []byte) schema.Verdict {
	return schema.Verdict{Delivery: delivery(sequence, fmt.Sprint("message ", sequence)),
		DeadLetter: &schema.DeadLetter{Kind: kind, Reason: "r", Payload: payload}}
}

// TestGarbageIsBounded sends a thousand messages of 60 kB: a few payloads are kept whole, the others are
// cut, and every message has a row with its reason.
func TestGarbageIsBounded(t *testing.T) {
	s, conn := open(t, postgres.Config{BatchSize: 64})
	ctx := testContext(t)
	garbage := bytes.Repeat([]byte("garbage "), 7500)
	const n = 1000
	errs := make(chan error, n)
	for i := range n {
		go func() { _, err := s.Record(ctx, garbled(uint64(i+1), "invalid", garbage)); errs <- err }()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if got := count(t, conn, `SELECT count(*) FROM decuwatch.dead_letters WHERE reason = 'r'
		AND payload_size = 60000`); got != n {
		t.Errorf("%d rows, want %d", got, n)
	}
	kept := count(t, conn, `SELECT sum(octet_length(payload)) FROM decuwatch.dead_letters`)
	if kept < 4<<20 || kept > 24<<20 { // two transactions may exceed the bound by what they write
		t.Errorf("%d bytes of payloads are kept", kept)
	}
	for _, wrong := range []string{
		`payload_state = 'whole' AND octet_length(payload) <> payload_size`, `payload_state = 'cut'
			AND octet_length(payload) <> 256`,
		`payload_state NOT IN ('whole', 'cut')`,
		`payload <> substring(convert_to(repeat('garbage ', 7500), 'UTF8') FOR octet_length(payload))`,
	} {
		if got := count(t, conn, `SELECT count(*) FROM decuwatch.dead_letters WHERE `+wrong); got != 0 {
			t.Errorf("%d rows: %s", got, wrong)
		}
	}
	if got := count(t, conn, `SELECT count(*) FROM decuwatch_views.dead_letters WHERE payload_state = 'cut'
		AND payload_bytes = 60000 AND payload_text LIKE 'garbage %'`); got < n/2 {
		t.Errorf("the view shows %d payloads that were cut", got)
	}
	// Small payloads, and those of messages that failed here, are kept whole all the same.
	mustRecord(t, s, garbled(n+1, "invalid", garbage[:256]))
	mustRecord(t, s, garbled(n+2, "given_up", garbage))
	if got := count(t, conn, `SELECT count(*) FROM decuwatch.dead_letters WHERE sequence > 1000
		AND payload_state = 'whole' AND octet_length(payload) = payload_size`); got != 2 {
		t.Errorf("%d of 2 payloads are whole", got)
	}
	// The hour is over.
	sudo(t, conn, `UPDATE decuwatch.dead_letters SET recorded_at = recorded_at - interval '61 minutes'`)
	mustRecord(t, s, garbled(n+3, "invalid", garbage))
	if got := count(t, conn, `SELECT count(*) FROM decuwatch.dead_letters WHERE sequence = 1003
		AND payload_state = 'whole'`); got != 1 {
		t.Error("the next hour's payload was cut")
	}
}

func TestPayloadsExpire(t *testing.T) {
	s, conn := open(t, postgres.Config{Maintenance: postgres.Maintenance{Payloads: 2 * day}})
	ctx := testContext(t)
	for i, kind := range []schema.DeadLetterKind{"invalid", "unknown_class", "unknown_model", "failed", "given_up"} {
		mustRecord(t, s, garbled(uint64(i+1), kind, []byte("{")))
	}
	whole := func(age time.Duration) int {
		t.Helper()
		sudo(t, conn, fmt.Sprintf(`UPDATE decuwatch.dead_letters SET recorded_at = now() - interval '%d seconds'`,
			int(age.Seconds())), `SET session_replication_role = origin`)
		if err := s.MaintainOnce(ctx); err != nil {
			t.Fatal(err)
		}
		return count(t, conn, `SELECT count(*) FROM decuwatch.dead_letters WHERE payload = '{' AND payload_state = 'whole'`)
	}
	if n := whole(2*day - time.Minute); n != 5 {
		t.Errorf("%d payloads before their time, want 5", n)
	}
	if n := whole(2*day + time.Minute); n != 2 {
		t.Errorf("%d payloads after their time, want those of failed and given_up", n)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.dead_letters WHERE payload = '' AND payload_state = 'expired'
		AND payload_size = 1 AND reason = 'r' AND digest IS NOT NULL`); n != 3 {
		t.Errorf("%d rows whose payload expired, want 3", n)
	}
	// No role may change anything else.
	for _, sql := range []string{
		`UPDATE decuwatch.dead_letters SET payload = ''`, `UPDATE decuwatch.dead_letters SET payload_state = 'expired'`,
		`UPDATE decuwatch.dead_letters
			SET payload = '', payload_state = 'expired', reason = 'other'`, `UPDATE decuwatch.dead_letters
			SET payload = 'x', payload_state = 'expired'`,
	} {
		if _, err := conn.Exec(ctx, sql); code(err) != "23000" {
			t.Errorf("%s: %v", sql, err)
		}
	}
}
