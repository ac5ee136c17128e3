# Every target creates .venv from the pinned constraints when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs
STAMP := $(VENV)/.installed
# accelerate gives a process one core unless told otherwise; first-stage alone takes them all.
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := OMP_NUM_THREADS=$(CORES) $(BIN)/accelerate launch --num_processes 1 --num_machines 1 \
  --mixed_precision no --dynamo_backend no
FIRST_STAGE := $(BIN)/first-stage

.PHONY: demo demo-diffusion demo-tokens test test-slow lint layers types docs gpu format clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(STAMP)

demo: $(STAMP)  ## Train on the built-in photos and hand the result to diffusers.
	$(FIRST_STAGE) train --config demo --output_dir $(RUNS)/demo --overwrite true

demo-diffusion: $(STAMP)  ## From digits to a first stage, a latent cache and a diffusion model's digits.
	$(FIRST_STAGE) train --config digits --output_dir $(RUNS)/digits --overwrite true
	rm -rf $(RUNS)/digits/latents $(RUNS)/digits/diffusion  # of the first stage that was replaced
	$(FIRST_STAGE) cache --first_stage $(RUNS)/digits/export --data.path digits \
	  --output $(RUNS)/digits/latents
	$(LAUNCH) examples/digits/train_diffusion.py --latents $(RUNS)/digits/latents \
	  --output_dir $(RUNS)/digits/diffusion --steps 1200
	$(BIN)/python examples/digits/score_digits.py --pipeline $(RUNS)/digits/diffusion/pipeline

demo-tokens: $(STAMP)  ## From digits to a first stage with a codebook, a token cache and a transformer's digits.
	$(FIRST_STAGE) train --config examples/tokens/digits_vq.yaml \
	  --output_dir $(RUNS)/digit_tokens --overwrite true
	rm -rf $(RUNS)/digit_tokens/cache $(RUNS)/digit_tokens/transformer  # of an earlier first stage
	$(FIRST_STAGE) cache --first_stage $(RUNS)/digit_tokens/export --data.path digits \
	  --output $(RUNS)/digit_tokens/cache --representation tokens
	$(BIN)/python examples/tokens/train_tokens.py --tokens $(RUNS)/digit_tokens/cache \
	  --output_dir $(RUNS)/digit_tokens/transformer

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

layers: $(STAMP)  ## Imports go one way.
	$(BIN)/lint-imports --no-logo

types: $(STAMP)
	$(BIN)/mypy

test: lint layers types  ## Lint, layers, types and the fast tests.
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(STAMP)  ## What takes longer: kill tests, larger multi-process runs.
	$(BIN)/python -m pytest -m slow

docs: $(STAMP)  ## The site, in site/; a broken link is an error.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/generate_reference.py
	$(BIN)/zensical build --clean --strict

gpu: $(STAMP)  ## On a machine with a GPU: everything that only such a machine can show, in 9 minutes.
	$(BIN)/python -m benchmarks gpu --page docs/benchmarks/gpu.md

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
