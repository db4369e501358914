# Every target sets itself up: a virtual environment in .venv, made again only when setup.py or pyproject.toml
# change. Another Python: make clean, then make test PYTHON=python3.13.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
ARGS ?=

# else pyright asks the network for a newer pyright
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-versions lint format bench docs clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## Train a teacher on digits, distil it to one step, draw the result (ARGS=... is passed on).
	@$(RUN) experiments/digits.py $(ARGS)

test: lint ## Lint, types, all tests but the slow ones.
	$(RUN) -m pytest -m 'not slow' --nbmake -n 2 --dist worksteal

test-slow: $(INSTALLED) ## The slow tests: whole runs, and recorded numbers (all of them if ../shared/golden is there).
	$(RUN) -m pytest -m slow --nbmake -n 2 --dist worksteal

test-versions: $(INSTALLED) ## One of each fast test with the oldest and the newest packages that setup.py allows.
	@$(RUN) tests/versions.py $(ARGS)

lint: $(INSTALLED) ## Check style (ruff) and types (pyright).
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(INSTALLED) ## Format the code and mend what lint can mend.
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(INSTALLED) ## Run every benchmark of a CPU; a summary with verdicts (ARGS=--write writes docs/performance.md).
	@$(RUN) benchmarks/summary.py $(ARGS)

docs: $(INSTALLED) ## Build the documentation as a site, in site/.
	@$(RUN) -m pip install -qq --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean: ## Remove environments and caches; results in runs/ stay.
	rm -rf .venv .venv-* site build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer with its venv module is needed; '$(PYTHON)' is not one" \
	       "($$($(PYTHON) --version 2>&1 | head -n 1))." >&2; \
	  echo "Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3" \
	       "(Debian and Ubuntu keep venv in the package python3-venv)." >&2; exit 1; }
	@echo "Installing into $(VENV) with $$($(PYTHON) --version): once, about a minute plus the download, 1.5 GB on disk."
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@
