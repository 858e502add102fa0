# What the tests of the review page need.

.PHONY: review-tools review-screenshots

review-tools: ## get Chromium, in which the review page is tested
	@review/fetch-chromium

review-screenshots: review-tools ## take the pictures of docs/review.md again
	@DECUWATCH_SCREENSHOTS="$(CURDIR)/docs/images" $(RUN) go test -count=1 -run TestPageInChromium ./review
