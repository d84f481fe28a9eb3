# make train: the tiny run from nothing.  make test: the tests from nothing.
# make methods: every method from the same start, a table (hours).
# make slices: LLaDA-8B compiled for TPU slices that are not attached (hours, an environment of
# its own with the TPU compiler).
# make bench: speed against PyTorch, against itself, against the bound (an hour).
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/sudoku_dispo.py

.PHONY: setup train test test-slow lint methods bench slices clean

setup: .venv/ready

.venv/ready: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dmrl needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

train: setup
	$(BIN)/python launch/train.py --config=$(CONFIG) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

methods: setup
	$(BIN)/python benchmarks/methods.py $(ARGS)

slices: .venv-tpu/ready
	.venv-tpu/bin/python benchmarks/slices.py $(ARGS)

.venv-tpu/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,tpu]'
	touch $@

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[bench]'
	$(BIN)/python benchmarks/speed.py $(ARGS)

clean:
	rm -rf .venv .venv-tpu build *.egg-info
