.PHONY: deploy-tools test-chart bench-dashboards bench-workers
.PHONY: restore-check upgrade-check

deploy-tools: ## get what the tests of deploy/ need: Prometheus, TypeScript with Grafana's types, NATS for Node.js
	@deploy/fetch-prometheus
	@deploy/fetch-dashboard-types
	@scripts/fetch-javascript

test-chart: ## render the Helm chart and check it against the types of Kubernetes and KEDA (a Go module of its own)
	cd deploy/helm && go vet . && go test .

test: deploy-tools test-chart

bench-dashboards: setup ## time the dashboards' queries at a million scores and 10 million rollups, with plans
	$(RUN) go test -run '^$$' -bench 'DashboardSQL|Rollups' -benchtime 5x -timeout 60m -v ./deploy

bench-workers: setup ## events a second of 1, 2 and 4 worker processes on one durable consumer
	$(RUN) go test -run '^$$' -bench Workers -benchtime 1x -timeout 30m ./deploy

restore-check: setup ## lose Postgres and the alerts' stream, and bring them back by the commands of docs/operating.md
	$(RUN) go test -count=1 -v -run '^(TestBackupAndRestore|TestPostgresLogins)$$' ./deploy

# The revision before the newest migration, for a worker that is older than the tables.
BEFORE = $(shell git log -1 --format=%h -- schema/postgres/migrations)~1

upgrade-check: setup ## old tables with rows to the newest, edited migrations, and an older worker on the new tables
	$(RUN) go test -count=1 -v -run '^(TestMigrations|TestUpgrade|TestOlderProgram|TestUnreleasedTables)' ./schema/postgres
	$(MAKE) faults SCENARIO=rolling-upgrade OLD=$(or $(OLD_REVISION),$(BEFORE))
