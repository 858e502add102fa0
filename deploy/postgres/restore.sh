#!/bin/sh
# Restores a backup into an empty database: restore.sh <FILE. The roles and logins come first (logins.sh, with the
# passwords in SECRETS), because the backup has their rights but not the logins. All or nothing: a restore that fails
# leaves the database empty. Connects as libpq does: PGHOST, PGUSER, PGPASSWORD and PGDATABASE, or what the Postgres
# image sets.
set -eu
fail() { echo "restore: $*" >&2; exit 1; }
export PGUSER="${PGUSER:-${POSTGRES_USER:-postgres}}" PGDATABASE="${PGDATABASE:-${POSTGRES_DB:-decuwatch}}"
ask() { psql --no-psqlrc --no-password --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 --command "$1"; }

there=$(ask "SELECT count(*) FROM pg_catalog.pg_namespace WHERE nspname IN ('decuwatch', 'decuwatch_views')")
[ "$there" = 0 ] || fail "the database $PGDATABASE holds decuwatch's tables already; restore into an empty one"
sh "$(dirname "$0")/logins.sh" </dev/null
pg_restore --no-password --dbname "$PGDATABASE" --no-owner --role=decuwatch_owner --exit-on-error --single-transaction
ask "ANALYZE"
may=$(ask "SELECT has_table_privilege('decuwatch_writer', 'decuwatch.events', 'INSERT')
	AND has_table_privilege('decuwatch_reader', 'decuwatch_views.scores', 'SELECT')")
[ "$may" = t ] || fail "the restored tables lack the rights of decuwatch_writer and decuwatch_reader"
