.PHONY: deploy-tools

deploy-tools: ## get what the tests of deploy/ need: Prometheus
	@deploy/fetch-prometheus
