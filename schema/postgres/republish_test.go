package postgres_test

import (
	"slices"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// TestOweAgain owes alerts to their stream again, whether the outbox still has the delivery or not. An alert that is
// owed already, over its budget or too old is not touched.
func TestOweAgain(t *testing.T) {
	s, conn := open(t, postgres.Config{Volume: postgres.Volume{ClassPerHour: 4}})
	ctx := testContext(t)
	for i, id := range []string{"known", "forgotten", "owed", "old", "held back"} {
		v := scoreVerdict(uint64(i+1), id)
		v.Alerts = []schema.Alert{alert(v.Score, id)}
		mustRecord(t, s, v)
	}
	before, err := s.OutboxNext(ctx, schema.SinkStream, 10, time.Nanosecond)
	if err != nil || len(before) != 4 {
		t.Fatalf("%d messages, %v", len(before), err)
	}
	sudo(t, conn, `UPDATE decuwatch.outbox SET delivered_at = now(), attempts = 3 WHERE message_id <> 'owed'`,
		`DELETE FROM decuwatch.outbox WHERE message_id = 'forgotten'`,
		`UPDATE decuwatch.alerts SET recorded_at = now() - interval '31 days' WHERE id = 'old'`, `UPDATE decuwatch.outbox
			SET delivered_at = now() - interval '31 days' WHERE message_id = 'old'`)
	for within, want := range map[time.Duration][]string{30 * day: {"forgotten", "known"},
		0: {"forgotten", "known", "old"}} {
		if sent, err := s.Sent(ctx, within); err != nil || !slices.Equal(sent, want) {
			t.Errorf("sent within %s: %v, %v, want %v", within, sent, err, want)
		}
	}
	for range 2 { // the second time changes nothing
		if err := s.OweAgain(ctx, []string{"forgotten", "known"}); err != nil {
			t.Fatal(err)
		}
	}
	after, err := s.OutboxNext(ctx, schema.SinkStream, 10, time.Minute)
	if err != nil || len(after) != 3 {
		t.Fatalf("%d messages are owed, %v; want known, forgotten and owed", len(after), err)
	}
	for _, m := range after {
		i := slices.IndexFunc(before, func(b schema.OutboxMessage) bool { return b.AlertID == m.AlertID })
		if i < 0 || m.Subject != before[i].Subject || string(m.Body) != string(before[i].Body) ||
			m.Header["Nats-Msg-Id"][0] != m.AlertID || m.Attempts != 0 {
			t.Errorf("%s is owed as another message: %+v", m.AlertID, m)
		}
	}
}
