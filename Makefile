# `make demo` makes a video, `make test` checks everything; both set up .venv by themselves the first time.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUIET := -qq --disable-pip-version-check --no-input
PIP := $(BIN)/python -m pip $(QUIET)
PINNED := $(shell sed -n '/^[a-zA-Z]/p' constraints.txt)
TORCH := $(filter torch==%,$(PINNED))
TORCH_INDEX ?=
TORCH_FROM := $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX))
# compat: a path, where the default is a hook that type checkers and editors do not run
EDITABLE := --config-settings editable_mode=compat
WORKERS ?= 2

# A step of an installation: its name, what it runs, the seconds that it took.
step = @printf '  %s ... ' '$(1)'; SECONDS=0; $(2) && echo "$$SECONDS s"

.PHONY: demo test test-all system test-training card check install lowest docker-steps clean

demo: $(STAMP)
	@$(BIN)/chitu generate "A cat walking on grass" --seed 1 -o outputs/demo.mp4

# The checks run beside the tests, which wait for other processes at times, and are told when they are done.
test: $(STAMP) system
	@{ $(MAKE) -s check > $(VENV)/check.txt 2>&1; code=$$?; cat $(VENV)/check.txt; exit $$code; } & checks=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest --quick -n $(WORKERS) --dist worksteal --ignore tests/test_house_rules.py; tests=$$?; \
	wait $$checks && exit $$tests

# and the long ones, too (tests/long_tests.py)
test-all: check system
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal --ignore tests/test_house_rules.py

# PostgreSQL and Chromium, for the service's tests: from the system's packages where that is allowed, else said loudly.
HAS_POSTGRES := command -v initdb > /dev/null || ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1
HAS_CHROMIUM := test -x /usr/bin/chromium
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq

system:
	@lacks=$$( ($(HAS_POSTGRES)) || echo postgresql; $(HAS_CHROMIUM) || echo chromium ); test -z "$$lacks" || { \
		test "$$(id -u)" = 0 && $(APT) update && $(APT) install -y --no-install-recommends $$lacks > /dev/null; } || \
		echo "*** LEFT OUT: tests that need" $$lacks "; as root: apt-get install" $$lacks "***"

test-training: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) training/tests

# the reliability card: docs/reliability.md, from tests with long loops (some ten minutes)
card: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reliability

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 3; exit $${PIPESTATUS[0]}
	@$(BIN)/pytest -q tests/test_house_rules.py

install: $(STAMP)

# The lowest versions that pyproject.toml allows, together, in an environment of their own; torch stays as pinned, since
# indexes keep its older CPU builds under another name.
LOWEST := $(VENV)/lowest
LOWEST_TESTS ?= tests/files tests/media tests/models tests/pipelines tests/sampling tests/weights tests/ops \
	tests/test_config.py tests/test_engine.py

lowest:
	@$(PYTHON) -m venv $(LOWEST)
	@sed -n 's/^ *"\([a-z_-]*\)>=\([0-9.]*\)["; ].*/\1==\2/p' pyproject.toml | grep -v '^torch=' > $(LOWEST)/lowest.txt
	$(call step,the lowest versions of pyproject.toml,$(LOWEST)/bin/pip $(QUIET) install $(TORCH) -r $(LOWEST)/lowest.txt)
	$(call step,this project,$(LOWEST)/bin/pip $(QUIET) install --no-build-isolation --no-deps -e . $(EDITABLE))
	@OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(LOWEST_TESTS)

# What the Dockerfile does, as far as it can be done without Docker, in a fresh folder.
docker-steps:
	@folder=$$(mktemp -d) && $(PYTHON) tests/dockerfile.py $$folder/image && rm -rf $$folder

# torch comes first and alone: so pip takes the pinned build, and does not search for another one later.
# Nothing is fetched for building, so that a change of these files needs no network.
$(STAMP): pyproject.toml setup.py constraints.txt Makefile
	@echo "setting up $(VENV), once: 2.7 GB with torch's CPU build, 6 GB with its CUDA build"
	@echo "TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the CPU build; after Ctrl+C the same command goes on"
	$(call step,1 of 3: a virtual environment,$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV))
	$(call step,2 of 3: $(TORCH) (190 MB for CPUs or 3 GB for CUDA),$(PIP) install $(TORCH) $(TORCH_FROM) -c constraints.txt)
	$(call step,3 of 3: $(words $(PINNED)) packages in all (400 MB more),$(PIP) install --no-build-isolation -e ".[dev]" $(EDITABLE) -c constraints.txt)
	@touch $(STAMP)

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
