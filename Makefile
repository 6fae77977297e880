# make demo | test | bench | kernels | lint: each creates .venv where it is missing or older than what it is installed from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test bench kernels lint

demo: $(INSTALLED)
	$(BIN)/soflow demo

# By two processes of one thread each.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 20

# Saved under .benchmarks; two runs are compared by .venv/bin/pytest-benchmark compare.
bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks --benchmark-autosave --benchmark-max-time 0.5

# Registers, spills and shared memory of every kernel, compiled for three GPU architectures.
kernels: $(INSTALLED)
	$(BIN)/python -m soflow_fast.kernels._aot

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
