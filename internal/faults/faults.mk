# The fault matrix of docs/reliability.md, with real processes. SEEDS=100 runs every kill scenario with 100 seeds and
# the others with 10; SCENARIO=name,name chooses; SEED=n begins with that seed, and without SEEDS replays one run;
# REPORT=file.json keeps the results; OLD is the revision of the older worker in a rolling upgrade. The scenario
# postgres-full needs root, for a small file system.
OLD = $(or $(shell git describe --tags --abbrev=0 2>/dev/null),HEAD~1)

.PHONY: faults

faults: setup ## break everything that the monitor depends on: SEEDS=100, SCENARIO=worker-killed, SEED=7, REPORT=file
	@$(RUN) go test -c -o bin/faults.test ./internal/faults
	@$(RUN) go build -o bin/decuwatch ./cmd/decuwatch
	@rm -rf bin/old && mkdir -p bin/old && git archive "$(OLD)" | tar -x -C bin/old
	@$(RUN) go -C bin/old build -o ../decuwatch-old ./cmd/decuwatch && rm -rf bin/old
	@root="$$PWD" && cd internal/faults && "$$root/$(RUN)" "$$root/bin/faults.test" \
		-test.run '^TestFaults$$' -test.timeout 0 \
		-binary "$$root/bin/decuwatch" -old "$$root/bin/decuwatch-old" -all -seeds "$(or $(SEEDS),1)" \
		$(if $(SCENARIO),-scenario "$(SCENARIO)") $(if $(SEED),-seed "$(SEED)") $(if $(REPORT),-report "$(abspath $(REPORT))")
