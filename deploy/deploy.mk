.PHONY: deploy-tools test-chart bench-dashboards bench-workers
.PHONY: image-check compose-check cluster-check restore-check upgrade-check pin-images

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

# The three below run real engines and take minutes, so they are no part of `make test`. deploy/check/lib.sh says what
# they need, and how CHECK_IMAGES chooses the images. What they get and build stays in ~/.cache/decuwatch/deploy-check.

image-check: ## build the image and run it read-only, without capabilities, as uid 10001: ready, scores, SIGTERM
	@deploy/check/image-check

compose-check: ## docker-compose.yml on a real engine: an event that alerts, canaries, two workers, webhook, backup
	@deploy/check/compose-check

cluster-check: ## the chart on a real control plane with helm: refusals, install, upgrade, rollout, drain
	@deploy/check/cluster-check

pin-images: ## ask the registry for the digest of each image that docker-compose.yml names by tag only, and write it
	@deploy/check/pin-images

restore-check: setup ## lose Postgres and the alerts' stream, and bring them back by the commands of docs/operating.md
	$(RUN) go test -count=1 -v -run '^(TestBackupAndRestore|TestPostgresLogins)$$' ./deploy

# The revision before the newest migration, for a worker that is older than the tables.
BEFORE = $(shell git log -1 --format=%h -- schema/postgres/migrations)~1

upgrade-check: setup ## old tables with rows to the newest, edited migrations, and an older worker on the new tables
	$(RUN) go test -count=1 -v -run '^(TestMigrations|TestUpgrade|TestOlderProgram|TestUnreleasedTables)' ./schema/postgres
	$(MAKE) faults SCENARIO=rolling-upgrade OLD=$(or $(OLD_REVISION),$(BEFORE))
