# Everything that people and CI run. `make help` lists it.
PYTHON ?= python3.11
BIN := .venv/bin
RUFF_PATHS := air_core orchestrator tests benchmarks tools
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
NOT_HERE := not gpu and not exhaustive
LARGE := (integration or ray)
export HF_HUB_OFFLINE := 1
# With it set, Python compiles each module again in each process.
unexport PYTHONDONTWRITEBYTECODE
# As uv does by default, leave modules to be compiled at their first import: pip would compile all
# 25,000 files, which takes a minute.
PIP := $(BIN)/pip install --no-compile --progress-bar off --disable-pip-version-check
INSTALL := $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(PIP))

.PHONY: help quickstart test integration exhaustive check pytest types format golden gpu-day tiny-world

help:           ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

quickstart: .venv/run   ## set up, run sweeps/quickstart.yaml, print the table
	@$(BIN)/airsweep run sweeps/quickstart.yaml; code=$$?; \
	command -v airsweep > /dev/null || \
	echo " first     source .venv/bin/activate   since airsweep is not on the PATH"; exit $$code

test: .venv/done        ## set up, then check all that needs no Ray, in ten minutes
	@$(MAKE) --no-print-directory check

integration: .venv/done ## set up, then test with Ray, on several machines, with real servers and browsers
	$(PYTEST) -m "$(LARGE) and $(NOT_HERE)" $$(grep -rlE 'mark.(integration|ray)' tests --include='test_*.py')

exhaustive: .venv/done  ## every case of tests of which CI runs some: each kill point, 2,000 edited sweeps
	$(PYTEST) -m exhaustive

check:          ## `make test` in an environment that exists: format, lint, types, imports, tests
	$(BIN)/ruff format --check $(RUFF_PATHS)
	$(BIN)/ruff check $(RUFF_PATHS)
	@$(MAKE) --no-print-directory --jobs=2 pytest types

pytest:
	$(PYTEST) -m "not $(LARGE) and $(NOT_HERE)"

types:
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format:         ## format and fix what can be fixed
	$(BIN)/ruff format $(RUFF_PATHS)
	$(BIN)/ruff check --fix $(RUFF_PATHS)

golden:         ## rewrite the golden files; review the diff
	AIRSWEEP_UPDATE_GOLDEN=1 $(BIN)/pytest -q -k golden

gpu-day: .venv/done     ## a day on one GPU: checks, a sweep, measurements, one report (GPU_DAY=options)
	$(BIN)/python benchmarks/gpu_day.py $(GPU_DAY)

tiny-world: .venv/done  ## pretrain the embedded CLIP and diffusion again (1.5 hours on one core)
	$(BIN)/python -m tools.tiny_world --work build/tiny_world --out air_core/tiny/weights

.venv/run: EXTRAS :=
.venv/done: EXTRAS := [dev]
# The exit status of a pipe is that of its last command, so a file says that pip has failed.
.venv/run .venv/done: pyproject.toml
	@echo "setting up .venv: a minute or two and 3 GB of disk, more for CUDA"
	@echo "  create it with $(PYTHON)"
	@$(PYTHON) -m venv .venv && rm -f .venv/failed
	@echo "  find torch, Ray, MLflow and the packages that they need"
	@{ $(INSTALL) -e '.$(EXTRAS)' || touch .venv/failed; } | \
	while read -r word file rest; do case "$$word $$rest" in \
	Downloading*[0-9][0-9].[0-9]*MB*|Downloading*GB*) echo "  download $${file##*/} $$rest";; \
	"Installing packages:"*) set -- $$rest; echo "  install $$(($$# - 1)) packages, half a minute";; esac; done
	@test ! -e .venv/failed
	@touch $@
