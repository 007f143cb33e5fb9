# Everything runs in .venv, which the first command makes. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
THREADS ?= 2
RUN ?= runs/reviews-$(shell date +%Y%m%d-%H%M%S)

.PHONY: install train test test-slow check format bench reviews clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

train: install
	$(BIN)/python -m agents train --run $(RUN)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist loadscope -m "not slow"

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist loadscope -m slow

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m benchmarks.main_job
	$(BIN)/python -m benchmarks.generation

reviews: install
	$(BIN)/python -m textenv.reviews.build

clean:
	rm -rf $(VENV) build dist *.egg-info
