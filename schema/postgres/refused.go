package postgres

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

// refused reports whether an error is about the contents of a row (data exceptions and constraint violations), not
// about the connection or the server.
func refused(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && len(e.Code) == 5 && (e.Code[:2] == "22" || e.Code[:2] == "23") && !missingPartition(err)
}

// Refused reports whether an error of Record or DeadLetter is about the verdict itself, so that retrying
// will not help. Any other error says that the database is away, slow, locked or full.
func Refused(err error) bool {
	var invalid *schema.Invalid
	return errors.As(err, &invalid) || errors.Is(err, ErrNotFinite) || refused(err)
}

// ofOneRow reports whether the contents of one row may have caused an error that does not say so: a limit, a trigger's
// exception, a page that cannot be read. The other rows are then written without it.
func ofOneRow(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && len(e.Code) == 5 && slices.Contains([]string{"21", "44", "54", "P0", "XX"}, e.Code[:2])
}

// collided reports whether an error goes away when the transaction is retried: a deadlock or a serialization failure.
func collided(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && (e.Code == "40P01" || e.Code == "40001")
}

func missingPartition(err error) bool {
	var e *pgconn.PgError
	// A violated constraint is named; a message would be in the server's language.
	return errors.As(err, &e) && e.Code == "23514" && e.TableName == "scores" && e.ConstraintName == ""
}

// Away reports whether an error of Open or of a statement may go away without a change to the settings: the server does
// not answer, starts, stops, has failed over to a standby, or has no connection left. A login, a database, a
// certificate or rights that are wrong do not go away.
func Away(err error) bool {
	var e *pgconn.PgError
	var config *pgconn.ParseConfigError
	var settings settings.Error
	var certificate *tls.CertificateVerificationError
	switch {
	case err == nil:
		return false
	case errors.Is(err, errNotWritable):
		return true
	case errors.Is(err, ErrSession), errors.Is(err, ErrNotMigrated), errors.Is(err, ErrEdited), errors.Is(err, ErrNewer),
		errors.As(err, &config), errors.As(err, &settings), errors.As(err, &certificate):
		return false
	case errors.As(err, &e):
		// Connection, resources, an operator's intervention (also: starting up, shutting down), system errors; 25006 is
		// a write on a standby.
		return len(e.Code) == 5 && (slices.Contains([]string{"08", "53", "57", "58"}, e.Code[:2]) || e.Code == "25006")
	}
	var network net.Error
	return errors.As(err, &network) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, context.DeadlineExceeded)
}
