#!/bin/sh
# Makes the logins of the monitor and of Grafana, with the passwords in SECRETS (default /run/secrets). The Postgres
# image runs it once, at the first start; run it by hand with PGHOST, PGUSER, PGPASSWORD and PGDATABASE set. It can run
# again, and then updates the passwords.
set -eu
secrets=${SECRETS:-/run/secrets}
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${PGUSER:-${POSTGRES_USER:-postgres}}" \
	--dbname "${PGDATABASE:-${POSTGRES_DB:-decuwatch}}" \
	--set writer="$(cat "$secrets/postgres-writer")" --set reader="$(cat "$secrets/postgres-reader")" <<'SQL'
SET client_min_messages = warning;
-- The migrations give these two their rights.
SELECT format('CREATE ROLE %I NOLOGIN', r) FROM unnest(ARRAY['decuwatch_writer', 'decuwatch_reader']) r
	WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = r) \gexec
SELECT format('CREATE ROLE %I LOGIN', r) FROM unnest(ARRAY['decuwatch_monitor', 'decuwatch_grafana']) r
	WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = r) \gexec
ALTER ROLE decuwatch_monitor PASSWORD :'writer';
ALTER ROLE decuwatch_grafana PASSWORD :'reader' CONNECTION LIMIT 20;
ALTER ROLE decuwatch_grafana SET default_transaction_read_only = on;
ALTER ROLE decuwatch_grafana SET statement_timeout = '30s';
GRANT decuwatch_writer TO decuwatch_monitor;
GRANT decuwatch_reader TO decuwatch_grafana;
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()) \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO decuwatch_writer, decuwatch_reader', current_database()) \gexec
SQL
