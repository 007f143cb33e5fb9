# Everything runs in .venv, which the first command makes. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
THREADS ?= 2
# The floors have an environment of their own. TORCH=2.13.0 tests them with another PyTorch than the floor.
FLOORS := .venv-floors
FLOORS_READY := $(FLOORS)/.ready-$(or $(TORCH),floor)
RAY := .venv-ray# Ray brings many packages, so it has an environment of its own too.
RAY_READY := $(RAY)/.ready
TRACKERS := .venv-trackers# Trackers bring as many.
TRACKERS_READY := $(TRACKERS)/.ready
RUN ?= runs/reviews-$(shell date +%Y%m%d-%H%M%S)

.PHONY: install train test test-slow test-floors test-ray test-trackers check format bench reviews clean

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

# Every `name>=version` of the project's dependencies becomes `name==version`.
$(FLOORS_READY): pyproject.toml
	$(PYTHON) -m venv --clear $(FLOORS)
	sed -n '/^dependencies/,/^\[tool/p' pyproject.toml | grep -oE '"[a-z0-9-]+(\[[a-z0-9]+\])?>=[0-9.]+' \
		| sed -E 's/"|\[.*\]//g; s/>=/==/; $(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' > $(FLOORS)/constraints.txt
	$(FLOORS)/bin/python -m pip install --quiet --upgrade pip
	$(FLOORS)/bin/python -m pip install --quiet --constraint $(FLOORS)/constraints.txt torch
	$(FLOORS)/bin/python -m pip install --quiet --constraint $(FLOORS)/constraints.txt --editable ".[dev]"
	touch $@

test-floors: $(FLOORS_READY)
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -n $(THREADS) --dist loadscope -m "not slow"

$(RAY_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(RAY)
	$(RAY)/bin/python -m pip install --quiet --upgrade pip
	$(RAY)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(RAY)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[ray]" pytest
	touch $@

test-ray: $(RAY_READY)
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/test_ray.py

$(TRACKERS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(TRACKERS)
	$(TRACKERS)/bin/python -m pip install --quiet --upgrade pip
	$(TRACKERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(TRACKERS)/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable ".[trackio,wandb,mlflow]" pytest
	touch $@

test-trackers: $(TRACKERS_READY)
	OMP_NUM_THREADS=1 $(TRACKERS)/bin/python -m pytest tests/test_trackers.py

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
	rm -rf $(VENV) $(FLOORS) $(RAY) $(TRACKERS) build dist *.egg-info
