#!/bin/sh
# Writes what cannot be made again, decuwatch's two schemas, to the standard output: backup.sh >FILE. Workers may run
# meanwhile. Connects as libpq does: PGHOST, PGUSER, PGPASSWORD and PGDATABASE, or what the Postgres image sets.
set -eu
exec pg_dump --no-password --username "${PGUSER:-${POSTGRES_USER:-postgres}}" \
	--dbname "${PGDATABASE:-${POSTGRES_DB:-decuwatch}}" \
	--format=custom --schema=decuwatch --schema=decuwatch_views
