# Everything a newcomer needs: `make demo` and `make test`. Each target installs what it needs into .venv, once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# One thread for each worker: the tests are many small computations, and two workers share the machine.
WORKERS     ?= 2
PYTEST_ARGS ?=
test slow zoo: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test slow browser lint format docs bench zoo clean

help:
	@echo "make demo    train six small networks, align each pair, print the table, draw demo/report.png"
	@echo "make test    the test suite (a few minutes on two cores)"
	@echo "make slow    the tests that are left out of it because they take long"
	@echo "make browser install what the tests of the report and of Ray clusters need besides; they skip without it"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite what it can"
	@echo "make docs    build the documentation into site/, strictly"
	@echo "make zoo     the wide sweeps over libraries of models (long)"
	@echo "make bench   the benchmarks (long)"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("permgraph needs Python 3.10 or later: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# A stamp says that an installation succeeded; it is stale when what it was made from has changed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[test,dev,demo,zoo,data]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(PYTEST_ARGS)

# The machine's own browser, else Debian's where root may install it, else Playwright's; and Ray. Whatever cannot be had
# here is said, and the tests that need it skip with that reason at the end of the run.
browser: $(VENV)/.dev
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; then :; \
	elif $(BIN)/python -m playwright install chromium-headless-shell; then :; \
	else echo "no browser can be installed here"; fi
	@$(PIP) install --quiet -c constraints.txt -e '.[ray]' || echo "Ray cannot be installed here"

# Resumes where it stopped, and writes docs/coverage.md; then the tests that are marked as zoo.
zoo: $(VENV)/.dev
	$(BIN)/python -m benchmarks.zoo sweep
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m zoo $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	@set -e; for script in benchmarks/*.py; do \
		case $$script in */_*) continue ;; esac; \
		echo "== $$script"; $(BIN)/python $$script; \
	done

clean:
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
