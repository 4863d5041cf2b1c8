# make prune     set up, prune the built-in model, print dense beside pruned
# make test      set up, check format, lint and types, run the tests, in minutes
# make test-all  that, and all others: the built-in model, every architecture, kills, damaged files, benchmarks
# make faults    set up, run the faults (tests/faults) at length: more than a hundred kills, thousands of damaged files
# make docs      set up, build the documentation: docs/_build/index.html

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= pruned
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 15

.PHONY: prune test test-all check faults docs setup clean

prune: $(VENV)/.ready
	rm -rf $(OUT) $(OUT).partial
	$(BIN)/prunella prune smollm2-135m -o $(OUT) --sparsity 0.5

test: check
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

faults: $(VENV)/.ready
	PRUNELLA_FAULTS=1 $(PYTEST) tests/faults

docs: $(VENV)/.ready
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

setup: $(VENV)/.ready

# torch first and alone: with it in place nothing else draws in another build of it.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(wildcard src/prunella/sparse/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT) $(OUT).partial docs/_build
