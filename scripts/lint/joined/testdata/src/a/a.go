package a

import (
	"context"
	"errors"
	"fmt"
	"io"
)

type message struct{}

func (message) Ack() error   { return nil }
func (message) Close() error { return nil }

var errKnown = errors.New("known")

func look() (bool, error) { return false, nil }

func acknowledged(msg message) error {
	owned, err := look()
	if err != nil || owned {
		return errors.Join(err, msg.Ack()) // want `msg.Ack is called although the error beside it may be set`
	}
	return nil
}

func wrapped(msg message) error {
	_, err := look()
	return fmt.Errorf("%w: %w", err, (msg.Ack())) // want `msg.Ack is called although the error beside it may be set`
}

func list(msg message, errs []error) error {
	return errors.Join(errs[0], msg.Ack()) // want `msg.Ack is called although the error beside it may be set`
}

func value(f func() error, err error) error {
	return errors.Join(err, f()) // want `f is called although the error beside it may be set`
}

func cleaned(msg message) error {
	_, err := look()
	return errors.Join(err, msg.Close())
}

func explained(ctx context.Context, msg message) error {
	_, err := look()
	return errors.Join(fmt.Errorf("%w: %w", err, context.Cause(ctx)), err, ctx.Err(), io.EOF)
}

func sentinel(msg message) error {
	return errors.Join(errKnown, io.EOF, msg.Ack())
}

func both(a, b message) error {
	return errors.Join(a.Ack(), b.Ack())
}
