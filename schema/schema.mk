# What the tests of schema/ need beside Go.

.PHONY: python-client
python-client: ## nats-py, for the test of the Python snippet in docs/events.md
	@schema/python-client

test: python-client
