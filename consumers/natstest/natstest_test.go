package natstest_test

import (
	"context"
	"os"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers/natstest"
)

func TestMain(m *testing.M) {
	natstest.RunIfChild()
	os.Exit(m.Run())
}

// An acknowledged message is still there after the server was killed and restarted, in both ways of running it.
func TestKillAndRestart(t *testing.T) {
	for name, o := range map[string]natstest.Options{"embedded": {}, "process": {Process: true, SyncAlways: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.StartWith(t, o)
			js := s.JetStream()
			ctx := context.Background()
			if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}}); err != nil {
				t.Fatal(err)
			}
			if _, err := js.Publish(ctx, "s", []byte("kept")); err != nil {
				t.Fatal(err)
			}
			s.Kill()
			s.Restart()
			var msg *jetstream.RawStreamMsg
			natstest.Until(t, "the message is read again", func() bool {
				stream, err := js.Stream(ctx, "S")
				if err != nil {
					return false
				}
				msg, err = stream.GetMsg(ctx, 1)
				return err == nil
			})
			if string(msg.Data) != "kept" {
				t.Errorf("read %q, published %q", msg.Data, "kept")
			}
		})
	}
}

// A stream of three replicas gets a new leader when its leader is killed.
func TestClusterLosesItsLeader(t *testing.T) {
	t.Parallel()
	c := natstest.StartCluster(t)
	nc := natstest.Connect(t, c.URL())
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	natstest.Until(t, "the stream is created", func() bool {
		_, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Replicas: 3})
		return err == nil
	})
	leader := c.StreamLeader("S")
	leader.Kill()
	natstest.Until(t, "the two that are left take a message", func() bool {
		_, err := js.Publish(ctx, "s", []byte("after"))
		return err == nil
	})
	if next := c.StreamLeader("S"); next == leader {
		t.Error("the killed server still leads")
	}
}
