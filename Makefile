# Everything that people and CI run. `make help` lists it.
PYTHON ?= python3.11
BIN := .venv/bin
RUFF_PATHS := air_core orchestrator tests benchmarks
export HF_HUB_OFFLINE := 1

.PHONY: help quickstart test check pytest types format golden tiny-world chaos

help:           ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

quickstart: .venv/done  ## set up, run sweeps/quickstart.yaml, print the table
	@$(BIN)/airsweep run sweeps/quickstart.yaml

test: .venv/done        ## set up, then all that CI runs
	@$(MAKE) --no-print-directory check

check:          ## all that CI runs, in an environment that is there
	$(BIN)/ruff format --check $(RUFF_PATHS)
	$(BIN)/ruff check $(RUFF_PATHS)
	@$(MAKE) --no-print-directory --jobs=2 pytest types

pytest:
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    -m "not gpu and not weights"

types:
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format:         ## format and fix what can be fixed
	$(BIN)/ruff format $(RUFF_PATHS)
	$(BIN)/ruff check --fix $(RUFF_PATHS)

golden:         ## rewrite the golden files; review the diff
	AIRSWEEP_UPDATE_GOLDEN=1 $(BIN)/pytest -q -k golden

tiny-world: .venv/done  ## pretrain the embedded CLIP and diffusion again (1.5 hours on one core)
	$(BIN)/python -m air_core.tiny --work build/tiny_world --out air_core/tiny/weights

chaos: .venv/done       ## kill the driver everywhere and look whether anything is lost
	AIRSWEEP_CHAOS=1 $(BIN)/pytest -m "not gpu and not weights" tests/test_chaos.py tests/test_runs.py

.venv/done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
