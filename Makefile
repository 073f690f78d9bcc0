# Every target works as the first command in a fresh clone: `make demo`, `make test`, `make lint`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all coverage fuzz lint format clean

demo: $(VENV)/.installed
	$(BIN)/halfbyte demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

# Everything that runs without a GPU, the slow tests too.
test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not gpu"

# Lines of src/ that the tests run on a CPU; fails below the share in pyproject.toml.
coverage: $(VENV)/.installed-dev
	$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage report

# Damaged files, found by coverage guidance: SECONDS for each kind of file.
SECONDS ?= 60
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[fuzz]"
	$(BIN)/python scripts/fuzz.py --seconds $(SECONDS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml src
	$(BIN)/python scripts/check_fixes.py
	$(BIN)/python -m pip check

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
