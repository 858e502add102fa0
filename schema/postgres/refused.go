package postgres

import (
	"errors"
	"slices"

	"github.com/jackc/pgx/v5/pgconn"

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
