# Everything a checkout needs: `make demo` and `make test` set up a virtual environment by themselves.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.installed

.PHONY: demo test test-fast test-long lint bench bench-quick clean

demo: $(READY)
	$(BIN)/python -m paa_gpu --out demo.png

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not long"

test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not long and not slow"

test-long: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.ratios
	$(BIN)/python -m pytest bench --benchmark-only

bench-quick: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-max-time=0.2 --benchmark-min-rounds=3

$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo.png
