# Every target creates .venv from the pinned constraints when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint types format clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(STAMP)

demo: $(STAMP)  ## Train on the built-in photos and hand the result to diffusers.
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  scripts/train.py --config configs/demo.yaml --output_dir $(RUNS)/demo --overwrite true

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

test: lint types  ## Lint, types and the fast tests.
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(STAMP)  ## What takes longer: kill tests, larger multi-process runs.
	$(BIN)/python -m pytest -m slow

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
