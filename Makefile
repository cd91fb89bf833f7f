# Two commands on a fresh machine: `make demo` and `make test`. Needs Python >= 3.10 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs
DATA ?= data

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types check clean

help:  ## Show these targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Tests and demo need no GPU, and torch and torchvision come from one index, or torchvision fails to import.
$(BIN)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed, $$($(PYTHON) --version) found; set PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

install: $(BIN)/installed  ## Make .venv and install the project with its test tools (about 3 minutes, 6 GB)

demo: $(BIN)/installed  ## Align the embedded tiny Stable Diffusion with SPO and print base against aligned
	$(BIN)/python -m experiments.demo --data $(DATA) --runs $(RUNS)

# In the files' order: by number of tests, which is xdist's own, the long killing tests would come last, and alone.
test: $(BIN)/installed  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(BIN)/installed  ## Style, formatting and the layers between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(BIN)/installed  ## Static types
	$(BIN)/mypy

check: lint types test  ## Everything that CI runs

clean:  ## Remove the environment and caches; runs and data stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
