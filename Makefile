# Two commands to begin with:
#   make run     three real processes, kubectl through them (ONCE=1: stop after the last command; REAL=1: to a real API server)
#   make test    style, types, and every test, end to end with a real API server where this machine can have one

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# Processes that the tests are spread over, file by file: three for two cores, because most of a test's time is waiting.
JOBS ?= $(shell $(PYTHON) -c 'import os; print((3 * os.cpu_count() + 1) // 2)')
# Two stages: what `make run` needs, and everything.
DEMO_STAMP := $(VENV)/.demo-installed
STAMP := $(VENV)/.installed
# What takes long shows on a terminal where it is, and elsewhere says that it begins and that it has ended.
PROGRESS := $(PYTHON) tests/support/progress.py

# In the order of collection: the long files of tests/e2e come in the middle, and many short ones fill up the end.
BY_FILE := --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run test lint unit unit-client ci fuzz differential bench budget report soak claim lock sbom dist client-file manual mixin site \
	number release-check image publish-image publish-index publish-chart sign publish-release clean

help:
	@sed -n '2,3s/^#  //p' Makefile
	@echo "  make bench   speed through the three roles beside OpenSSH, in under two minutes (FULL=1: every peer and study, 40 minutes; OUT=FILE)"
	@echo "  make budget  calls, allocations, system calls and wake-ups of an open, an echo, a GET, an exec and a join, beside bench/budget.json (WRITE=1: write it)"
	@echo "  make report  tables, plots and goals of a result of it (FILE=RESULT.json OUT=DIRECTORY)"
	@echo "  make soak    200 streams with checksums while relays are killed (DURATION=1200: seconds; OUT=FILE: keep the result)"
	@echo "  make lint    style and types alone"
	@echo "  make ci      what CI runs, on a fresh clone: .ci/run"
	@echo "  make fuzz    parsers of outside input, guided by coverage, and what inputs cost (TARGET='NAME NAME' or all, SECONDS=60; without a name: which there are)"
	@echo "  make claim   the tests that hold one claim of docs/security.md, or one row of docs/threats.md (CODE=C1)"
	@echo "  make dist    wheel, source archive, charts, bill of materials, single-file client, deb and rpm, documentation and checksums of the last commit, reproducibly (OUT=dist)"
	@echo "  make sbom    the bill of materials alone (CycloneDX)"
	@echo "  make manual  the man pages and docs/reference.md anew, from the tables of the program"
	@echo "  make mixin   the dashboard anew; with OUT=DIRECTORY rules and dashboard for your Prometheus and Grafana (RUNBOOKS=URL OBJECTIVE=0.999)"
	@echo "  make site    the documentation as a site that needs no server (OUT=build/site)"
	@echo "  make lock    the lock files anew, after a change of dependencies (UPGRADE=1: to the newest of each)"
	@echo "  make unit    every test that does not start the roles as processes (VENV=DIRECTORY PYTHON=python3.13: on another Python)"
	@echo "  make unit-client  those of what a client is made of; on macOS and Windows too"
	@echo "  make number  the version, in each place that has it (VERSION=0.2.0); the steps of a release are in .github/workflows/release.yml"

INSTALL = $(PROGRESS) "installing into $(VENV)" -- $(BIN)/python -m pip install --no-compile --progress-bar off --disable-pip-version-check

$(DEMO_STAMP): pyproject.toml arcbridge/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PROGRESS) "preparing $(VENV)" -- $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(INSTALL) --editable . --group demo
	@touch $(DEMO_STAMP)

$(STAMP): $(DEMO_STAMP)
	@$(INSTALL) --group dev
	@touch $(STAMP)

run: $(DEMO_STAMP)
	@$(BIN)/python -m tests.demo $(if $(ONCE),--once) $(if $(REAL),--real)

# What runs on Windows and macOS too; each has lines that the other does not reach.
ELSEWHERE := arcbridge/client arcbridge/cli arcbridge/__main__.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --no-warn-unreachable --cache-dir .mypy_cache/win32 $(ELSEWHERE)
	$(BIN)/mypy --platform darwin --no-warn-unreachable --cache-dir .mypy_cache/darwin $(ELSEWHERE)

# Building the real parts takes minutes the first time, far beyond the deadline of any one test. Where they cannot be
# built the tests that need them say so. LINTED=1: style and types are seen to by another call of make, as in .ci/run.
test: $(if $(LINTED),$(STAMP),lint)
	-@$(BIN)/python -m tests.support.cluster build --helm
	-@$(BIN)/python -m tests.identity.kubernetes.recording
	-@$(BIN)/python -m tests.support.keycloak build
	$(BIN)/python -m pytest -n $(JOBS) $(BY_FILE) $(PYTEST_ARGS)

# What a version of Python can break: the tests that do not start the roles as processes.
unit: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) $(BY_FILE) $(addprefix --ignore=tests/,e2e demo keycloak release support walkthrough) $(PYTEST_ARGS)

# What a client is made of.
CLIENT_TESTS := $(addprefix tests/,client cli mux net observe settings wire)

unit-client: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) $(BY_FILE) $(CLIENT_TESTS) $(PYTEST_ARGS)

ci:
	@.ci/run

# SECONDS is a variable of bash, which would not pass an empty one on: make's own default counts here.
SECONDS := $(if $(filter command line,$(origin SECONDS)),$(SECONDS),60)

fuzz: $(STAMP)
	@$(BIN)/python -m tests.fuzz $(if $(TARGET),$(TARGET),--help) --seconds $(SECONDS) $(if $(FOUND),--found $(FOUND))

differential: $(STAMP)
	@$(BIN)/python -m tests.differential --seconds $(SECONDS)

bench: $(STAMP)
	@$(BIN)/python -m bench $(if $(FULL),--full,--quick) $(if $(OUT),--out $(OUT))

budget: $(STAMP)
	@$(BIN)/python -m bench.budget $(if $(WRITE),--write)

report: $(STAMP)
	@$(if $(FILE),,echo "error: which result? make report FILE=bench/results/NAME.json OUT=DIRECTORY" >&2; exit 2)
	@$(BIN)/python -m bench report $(FILE) $(if $(OUT),--out $(OUT))

DURATION ?= 1200

soak: $(STAMP)
	@$(BIN)/python -m bench.soak --duration $(DURATION) $(if $(OUT),--out $(OUT)) $(SOAK_ARGS)

claim: $(STAMP)
	@$(if $(CODE),,echo "error: which claim? make claim CODE=C1, as in docs/security.md" >&2; exit 2)
	@tests=$$($(BIN)/python -m tests.support.citations $(CODE)) && $(BIN)/python -m pytest $$tests $(PYTEST_ARGS)

lock: $(STAMP)
	@PYTHONPATH=.ci $(BIN)/python -m release lock $(if $(UPGRADE),--upgrade)

manual: $(STAMP)
	@PYTHONPATH=.ci $(BIN)/python -m release manual

mixin: $(STAMP)
	@PYTHONPATH=.ci $(BIN)/python -m release mixin $(if $(OUT),--out '$(OUT)') $(if $(RUNBOOKS),--runbooks '$(RUNBOOKS)') $(if $(OBJECTIVE),--objective '$(OBJECTIVE)')

sbom dist client-file site: $(STAMP)
	@PYTHONPATH=.ci $(BIN)/python -m release $@ $(if $(OUT),--out $(OUT))

number:
	@PYTHONPATH=.ci $(PYTHON) -m release.number '$(VERSION)'

# With the Python of the machine and nothing installed: these hold the tokens of a release.
release-check image publish-image publish-index publish-chart sign publish-release:
	@PYTHONPATH=.ci $(PYTHON) -m release.publish $@ $(if $(OUT),--out $(OUT))

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
