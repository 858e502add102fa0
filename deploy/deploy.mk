.PHONY: deploy-tools bench-dashboards

deploy-tools: ## get what the tests of deploy/ need: Prometheus, TypeScript with Grafana's types
	@deploy/fetch-prometheus
	@deploy/fetch-dashboard-types

bench-dashboards: setup ## time every dashboard query and the rollups at a million scores and 10 million rollups, with plans
	$(RUN) go test -run '^$$' -bench 'DashboardSQL|Rollups' -benchtime 5x -timeout 60m -v ./deploy
