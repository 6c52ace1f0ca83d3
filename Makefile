# `make quickstart` and `make test` work on a fresh machine: they create .venv and install the pinned dependencies.
# On Debian, Python's venv is a package of its own: apt install python3-venv

PYTHON ?= python3
MINUTES ?= 15
BIN := .venv/bin
READY := .venv/.installed

.PHONY: quickstart test test-all check format clean

quickstart: $(READY)  ## base, R1-Zero, R1 and a student, compared in one report, in about MINUTES
	$(BIN)/shoal quickstart --minutes $(MINUTES)

test: $(READY)  ## the fast tier: two minutes on two cores
	$(BIN)/python -m pytest

test-all: $(READY)  ## the slow and multi-process tiers too; GPU and browser tests skip where there is none
	$(BIN)/python -m pytest -m ""

check: $(READY)  ## style, types, and the line budget
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python tools/budget.py

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## everything that make made; runs/ stays
	rm -rf .venv build dist *.egg-info

# Torch goes first: whichever build of the pinned version the machine offers, nothing after it may change it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Installing into .venv, the first time only: 1 of 2, torch (the big one)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@echo "2 of 2, shoal and its tools"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,interop,serve,pg]'
	@touch $@
