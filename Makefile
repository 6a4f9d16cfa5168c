# One environment; `check` is what CI runs: ruff, mypy and the tests.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install tune test lint check

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

tune: install
	$(BIN)/python scripts/tune_calib.py
	$(BIN)/python scripts/tune_calib.py --wprec 4 --aprec 4

test: install
	$(BIN)/python -m pytest

check: lint test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
