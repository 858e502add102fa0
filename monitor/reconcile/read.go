package reconcile

import (
	"context"
	"errors"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/decuwatch/decuwatch/consumers"
)

// Messages are read in windows. The chunks of a window are read at the same time, each by one request after the other.
const (
	chunk     = 64
	perWindow = 32
)

// readAll calls f with the messages that the stream had at the time of state, window by window, in order. First and
// last are the sequence numbers that a window covers. Together the windows cover all from the first message to the
// last.
func readAll(
	ctx context.Context, js jetstream.JetStream, stream string, state jetstream.StreamState,
	f func(messages []consumers.Stored, first, last uint64) error,
) error {
	if state.Msgs == 0 {
		return nil
	}
	windows := make(chan window) // the next is read while one is compared
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer close(windows)
		for first := max(state.FirstSeq, 1); first <= state.LastSeq; {
			w, err := readWindow(ctx, js, stream, first, state.LastSeq)
			if err != nil {
				return err
			}
			select {
			case windows <- w:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			first = w.last + 1
		}
		return nil
	})
	group.Go(func() error {
		for w := range windows {
			if err := f(w.messages, w.first, w.last); err != nil {
				return err
			}
		}
		return nil
	})
	return group.Wait()
}

// window is the messages in a range of sequence numbers.
type window struct {
	messages    []consumers.Stored
	first, last uint64
}

// readWindow reads a window. It covers deleted messages behind it, too.
func readWindow(ctx context.Context, js jetstream.JetStream, stream string, first, end uint64) (window, error) {
	var chunks [perWindow][]consumers.Stored
	var following [perWindow]uint64 // sequence number of the first message after the chunk
	group, ctx := errgroup.WithContext(ctx)
	for i := range chunks {
		group.Go(func() (err error) {
			from := first + uint64(i)*chunk //nolint:gosec // small
			chunks[i], following[i], err = readChunk(ctx, js, stream, from, min(from+chunk-1, end))
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return window{}, err
	}
	w := window{first: first, last: min(max(following[perWindow-1], first+perWindow*chunk)-1, end)}
	for _, c := range chunks {
		w.messages = append(w.messages, c...)
	}
	return w, nil
}

// readChunk returns the messages from <= sequence <= to, and the sequence number of the first message after them.
func readChunk(
	ctx context.Context, js jetstream.JetStream, stream string, from, to uint64,
) ([]consumers.Stored, uint64, error) {
	var messages []consumers.Stored
	for from <= to {
		m, err := consumers.ReadNext(ctx, js, stream, from, ">")
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return messages, 1 << 63, nil
		}
		if err != nil {
			return nil, 0, err
		}
		if m.Sequence > to {
			return messages, m.Sequence, nil
		}
		messages = append(messages, m)
		from = m.Sequence + 1
	}
	return messages, from, nil
}
