#!/bin/sh
# Makes the logins of the migration, the monitor and Grafana, with the passwords in SECRETS (default /run/secrets). The
# Postgres image runs it once, at the first start; run it by hand with PGHOST, PGUSER, PGPASSWORD and PGDATABASE set, as
# an administrator: a superuser, or a role with CREATEROLE that owns the database. It can run again. It then updates the
# passwords, and gives tables that the administrator has made itself to decuwatch_owner.
set -eu
secrets=${SECRETS:-/run/secrets}
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${PGUSER:-${POSTGRES_USER:-postgres}}" \
	--dbname "${PGDATABASE:-${POSTGRES_DB:-decuwatch}}" --set owner="$(cat "$secrets/postgres-owner")" \
	--set writer="$(cat "$secrets/postgres-writer")" --set reader="$(cat "$secrets/postgres-reader")" <<'SQL'
SET client_min_messages = warning;
-- The migrations give these two their rights.
SELECT format('CREATE ROLE %I NOLOGIN', r) FROM unnest(ARRAY['decuwatch_writer', 'decuwatch_reader']) r
	WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = r) \gexec
SELECT format('CREATE ROLE %I LOGIN', r)
	FROM unnest(ARRAY['decuwatch_owner', 'decuwatch_monitor', 'decuwatch_grafana']) r
	WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = r) \gexec
ALTER ROLE decuwatch_owner PASSWORD :'owner';
ALTER ROLE decuwatch_monitor PASSWORD :'writer';
ALTER ROLE decuwatch_grafana PASSWORD :'reader' CONNECTION LIMIT 20;
ALTER ROLE decuwatch_grafana SET default_transaction_read_only = on;
ALTER ROLE decuwatch_grafana SET statement_timeout = '30s';
GRANT decuwatch_writer TO decuwatch_monitor;
GRANT decuwatch_reader TO decuwatch_grafana;
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()) \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO decuwatch_writer, decuwatch_reader', current_database()) \gexec
SELECT format('GRANT CONNECT, CREATE, TEMPORARY ON DATABASE %I TO decuwatch_owner', current_database()) \gexec
-- An administrator who is no superuser must be a member to give tables away.
SELECT format('GRANT decuwatch_owner TO %I', current_user)
	WHERE NOT pg_catalog.pg_has_role(current_user, 'decuwatch_owner', 'MEMBER') \gexec
-- What the administrator owns in the two schemas. Indexes, sequences of columns and types of tables follow tables.
SELECT format('ALTER SCHEMA %I OWNER TO decuwatch_owner', nspname) FROM pg_catalog.pg_namespace
	WHERE nspname IN ('decuwatch', 'decuwatch_views') AND nspowner <> 'decuwatch_owner'::regrole
UNION ALL
SELECT format('ALTER %s %s OWNER TO decuwatch_owner', CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'm'
		THEN 'MATERIALIZED VIEW' WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, oid::regclass) FROM pg_catalog.pg_class c
	WHERE relnamespace IN (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname IN ('decuwatch', 'decuwatch_views'))
		AND relkind IN ('r', 'p', 'v', 'm', 'S') AND relowner <> 'decuwatch_owner'::regrole
		AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass
			AND d.objid = c.oid AND c.relkind = 'S' AND d.deptype IN ('a', 'i'))
UNION ALL
SELECT format('ALTER DOMAIN %s OWNER TO decuwatch_owner', oid::regtype) FROM pg_catalog.pg_type
	WHERE typnamespace IN (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname IN ('decuwatch', 'decuwatch_views'))
		AND typtype = 'd' AND typowner <> 'decuwatch_owner'::regrole
UNION ALL
SELECT format('ALTER ROUTINE %s OWNER TO decuwatch_owner', oid::regprocedure) FROM pg_catalog.pg_proc
	WHERE pronamespace IN (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname IN ('decuwatch', 'decuwatch_views'))
		AND proowner <> 'decuwatch_owner'::regrole
\gexec
SQL
