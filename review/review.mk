# What the tests of the review page need.

.PHONY: review-tools review-screenshots

review-tools: ## get what the tests of the review page need: Chromium, axe-core
	@review/fetch-chromium
	@scripts/fetch-javascript

review-screenshots: review-tools ## take the pictures of the review page in docs again
	@DECUWATCH_SCREENSHOTS="$(CURDIR)/docs/images" $(RUN) go test -count=1 \
		-run 'TestPageInChromium|TestSilencesInChromium' ./review
