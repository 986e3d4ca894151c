# `make train` and `make test` do all set-up themselves; it is redone only when what it depends on changes.
.DELETE_ON_ERROR:
.PHONY: train test test-all chaos lint types setup clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

train: $(READY)
	@$(BIN)/lockstep train gpt-stdlib

test: $(READY)
	$(BIN)/pytest -m "not long"

test-all: $(READY)
	$(BIN)/pytest $(PYTEST_OPTIONS)

# Faults on purpose: a case for every seed, FIRST being the first of them, and a table of what became of each.
SEEDS ?= 100
FIRST ?= 0
chaos: $(READY)
	$(BIN)/python -m tests.chaos.campaign --seeds $(SEEDS) --first $(FIRST) --out benchmarks/results/chaos

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

setup: $(READY)

# torch first, and pinned: unpinned, another package's requirement could bring a second build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "Lockstep needs Python 3.11 or 3.12, $(PYTHON) is %d.%d; run make PYTHON=python3.11" % v)'
	@echo "setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
