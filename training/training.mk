# Training and its tests. Nothing here is needed to build, test or run the monitor.

# Where an ensemble is built. An interrupted run continues from its checkpoints there. Remove it to begin from scratch.
ENSEMBLE_BUILD ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/decuwatch/ensemble-fashion-mnist
EVALUATE ?=
DATA_CARD ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/decuwatch/data-card-fashion-mnist
DECUWATCH_TRAIN = PYTHONPATH=training "$$(training/setup)/bin/python" -m decuwatch_training

.PHONY: ensemble check-ensemble evaluate-ensemble evaluate-spoiled \
	data-card test-training lock-training

ensemble: ## train ensembles/fashion-mnist from scratch, or from where it stopped, and export it
	@begun=$$(date +%s) && data=$$(training/fetch-fashion-mnist) && \
	$(DECUWATCH_TRAIN) pretrain --data "$$data" --out "$(ENSEMBLE_BUILD)/backbone" && \
	$(DECUWATCH_TRAIN) train --backbone "$(ENSEMBLE_BUILD)/backbone" --data "$$data" --out "$(ENSEMBLE_BUILD)/tables" \
		--bins 1 10 100 1000 5000 --rotations 5 --components 5 --steps 700 --producer-steps 2800 && \
	{ [ -e "$(ENSEMBLE_BUILD)/judge/judge.json" ] || \
		$(DECUWATCH_TRAIN) judge --data "$$data" --out "$(ENSEMBLE_BUILD)/judge"; } && \
	$(DECUWATCH_TRAIN) export --backbone "$(ENSEMBLE_BUILD)/backbone" --run "$(ENSEMBLE_BUILD)/tables" \
		--judge "$(ENSEMBLE_BUILD)/judge" --out ensembles/fashion-mnist --members 3 --producer-member \
		--name fashion-mnist --profile training/fashion-mnist-profile.json --golden && \
	echo "make ensemble took $$((($$(date +%s) - begun + 59) / 60)) minutes"

check-ensemble: ## compare the exported ensemble with the PyTorch model it came from
	@$(DECUWATCH_TRAIN) check ensembles/fashion-mnist --backbone "$(ENSEMBLE_BUILD)/backbone"

evaluate-ensemble: ## the tables and plots of docs/evaluation.md
	@data=$$(training/fetch-fashion-mnist) && \
	$(DECUWATCH_TRAIN) evaluate ensembles/fashion-mnist --out "$(ENSEMBLE_BUILD)/evaluation" --data "$$data" $(EVALUATE)

evaluate-spoiled: ## what the data card finds in classes with duplicates, wrong labels and a hidden mode
	@data=$$(training/fetch-fashion-mnist) && \
	PYTHONPATH=training "$$(training/setup)/bin/python" training/spoiled.py "$$data" "$(ENSEMBLE_BUILD)/spoiled"

data-card: ## the data card of docs/training.md, from data with duplicates and wrong labels
	@data=$$(training/fetch-fashion-mnist) && rm -rf "$(DATA_CARD)" && \
	PYTHONPATH=training "$$(training/setup)/bin/python" training/spoil.py "$$data" "$(DATA_CARD)/images" && \
	$(DECUWATCH_TRAIN) inspect "$(DATA_CARD)/images" --size 32 --show 6 --out "$(DATA_CARD)"

test-training: ## ruff, mypy and pytest of training/
	@venv=$$(training/setup) && cd training && \
	"$$venv/bin/ruff" check . && "$$venv/bin/ruff" format --check . && "$$venv/bin/mypy" && \
	"$$venv/bin/python" -m pytest -q

COMPILE = uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

lock-training: ## renew training/requirements.lock and bootstrap.lock; needs uv
	cd training && $(COMPILE) --extra dev pyproject.toml -o requirements.lock
	cd training && echo uv | $(COMPILE) - -o bootstrap.lock
