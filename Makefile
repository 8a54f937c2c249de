# `make demo` makes a video, `make test` checks everything; both set up .venv by themselves the first time.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip -qq --disable-pip-version-check --no-input
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
WORKERS ?= 2

.PHONY: demo test test-training check install clean

demo: $(STAMP)
	@$(BIN)/chitu generate "A cat walking on grass" --seed 1 -o outputs/demo.mp4

test: check
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal --ignore tests/test_house_rules.py

test-training: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) training/tests

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 3; exit $${PIPESTATUS[0]}
	@$(BIN)/pytest -q tests/test_house_rules.py

install: $(STAMP)

# torch comes first and alone: so pip takes the pinned build, and does not search for another one later
# (compat: a path, where the default is a hook that type checkers and editors do not run)
$(STAMP): pyproject.toml constraints.txt Makefile
	@echo "setting up $(VENV) (once; some minutes, by network and disk) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)" -c constraints.txt
	@$(PIP) install -e ".[dev]" --config-settings editable_mode=compat -c constraints.txt
	@touch $(STAMP)

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
