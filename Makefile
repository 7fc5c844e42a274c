# From a fresh clone: `make quickstart`, `make test`. Both set up .venv first, once.
PYTHON ?= python3
EXTRAS ?= llm,test
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast nightly lint format docs clean
export PYTHONUNBUFFERED = 1

PY := .venv/bin/python
# Two test processes; the tests of a file stay together and share what they compiled.
WORKERS ?= -n 2 --dist loadfile
# An editable install names its folder: another folder or other extras are another set-up.
STAMP := .venv/ready-$(shell echo "$(CURDIR) $(EXTRAS)" | cksum | cut -d" " -f1)

help:
	@echo "make quickstart   train the embedded model (a few minutes on 2 cores)"
	@echo "make test         lint, format check and every test, as CI does"
	@echo "make test-fast    the tests that are not slow"
	@echo "make nightly      what takes longer: studies in small, the wheel in an empty folder"
	@echo "make lint         ruff check, ruff format --check, mypy"
	@echo "make format       sort imports and format"
	@echo "make docs         the documentation as a site in build/site"
	@echo "make clean        remove .venv and caches, keep runs/"
	@echo "PYTHON=python3.12 chooses the interpreter of .venv, EXTRAS=llm,test,cuda the extras"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed and $(PYTHON) is %d.%d: name another one with PYTHON=/path/to/python3.11" % v[:2])'
	@echo "Setting up .venv with the versions of constraints.txt and the extras $(EXTRAS) (minutes, once)"
	@$(PY) -m pip --version >/dev/null 2>&1 || { set -x; $(PYTHON) -m venv --clear .venv; }
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

quickstart: $(STAMP)
	$(PY) scripts/train.py --config configs/quickstart.py

test: lint
	$(PY) -m pytest $(WORKERS)

test-fast: $(STAMP)
	$(PY) -m pytest $(WORKERS) -m "not slow"

nightly: $(STAMP)
	$(PY) -m pytest -m nightly

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(STAMP)
	@$(PY) -m mkdocs --version >/dev/null 2>&1 || $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find basis_jax benchmarks configs scripts studies tests -name __pycache__ -prune -exec rm -rf {} +
