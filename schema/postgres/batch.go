package postgres

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"

	"github.com/jackc/pgx/v5"
)

// batch is a list of statements that travel together.
type batch struct {
	pgx.Batch
	err error
}

// insert adds a statement that inserts rows into a table; no rows, no statement. The rows' JSON names are the columns.
func insert[T any](b *batch, table, conflict string, rows []T) {
	addRows(b, insertStatement[T](table)+" "+conflict, rows)
}

// addRows adds a statement whose parameter is rows as a JSON array; no rows, no statement.
func addRows[T any](b *batch, sql string, rows []T) {
	if len(rows) == 0 || b.err != nil {
		return
	}
	input, err := json.Marshal(rows)
	if err != nil {
		b.err = fmt.Errorf("encode rows: %w", err)
		return
	}
	b.Queue(sql, input)
}

// notify adds a notification on a channel, sent at the commit.
func (b *batch) notify(channel string) { b.Queue(`SELECT pg_catalog.pg_notify($1, '')`, channel) }

func (b *batch) send(ctx context.Context, tx pgx.Tx) error {
	if b.err != nil || b.Len() == 0 {
		return b.err
	}
	return tx.SendBatch(ctx, &b.Batch).Close()
}

// insertStatement returns a statement that inserts the rows of T in its parameter, a JSON array.
func insertStatement[T any](table string) string {
	columns := strings.Join(columnsOf(reflect.TypeFor[T]()), ", ")
	return fmt.Sprintf("INSERT INTO decuwatch.%[1]s (%[2]s) SELECT %[2]s FROM "+
		"json_populate_recordset(NULL::decuwatch.%[1]s, $1)",
		table, columns)
}

// columnsOf returns the columns of a row's type: its JSON names, and what its method columns adds. A field with
// omitempty is set by the database.
func columnsOf(row reflect.Type) []string {
	if row.Kind() == reflect.Pointer {
		row = row.Elem()
	}
	var columns []string
	if more, ok := reflect.Zero(row).Interface().(interface{ columns() []string }); ok {
		columns = more.columns()
	}
	for _, f := range reflect.VisibleFields(row) {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name != "" && name != "-" && options != "omitempty" {
			columns = append(columns, name)
		}
	}
	return columns
}

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// list returns the rows of a query, each read by to.
func list[T any](ctx context.Context, q querier, to pgx.RowToFunc[T], sql string, args ...any) ([]T, error) {
	rows, err := q.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, to)
}
