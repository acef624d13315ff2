# Layersweep's short commands. `make` alone lists them. All of them set up .venv first where needed.
# Another interpreter for .venv: make PYTHON=/path/to/python3.12 demo
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo plan test test-cluster check format clean

PYTHON ?=
READY := .venv/.ready
PY := .venv/bin/python

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r name text; do \
	  printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(READY) ## Create .venv with the tested versions (downloads about 3 GB once)

demo: $(READY) ## Calibrate the shipped tiny model on two CPU ranks and show the report
	@rm -rf outputs/demo-nvfp4 outputs/demo-nvfp4.partial
	@OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 \
	  -m launch.calibrate experiment=demo

plan: $(READY) ## Plan Nemotron 3 Ultra under the published recipe: no weights, no GPU
	@$(PY) -m launch.plan model=nemotron3_ultra recipe=nvfp4_four_over_six

test: $(READY) ## Run all tests but the longest, slow ones and real gloo ranks included, on two workers
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not cluster" -n 2 --dist loadfile

test-cluster: $(READY) ## Run the longest: jobs on a real Slurm of two nodes, two hosts (root, minutes)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m cluster

check: $(READY) ## Formatting, lint and types
	@$(PY) -m ruff format --check --quiet . || { echo "ruff format: run 'make format'" >&2; exit 1; }
	@$(PY) -m ruff check --quiet .
	@$(PY) -m mypy --strict pipeline launch

format: $(READY) ## Let ruff format and mend what it can
	@$(PY) -m ruff format --quiet .
	@$(PY) -m ruff check --quiet --fix .

clean: ## Remove .venv, caches and build leftovers (results stay)
	@rm -rf .venv build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find pipeline launch conf tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is newer than both files once their packages are installed. A working .venv is kept.
$(READY): pyproject.toml constraints.txt
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  python="$$(.ci/find-python "$(PYTHON)")"; \
	  echo "Creating .venv with $$("$$python" --version) ($$python)"; \
	  "$$python" -m venv --clear .venv; \
	fi
	@echo "Installing Layersweep and what it needs into .venv (the first time: about 3 GB, some minutes)"
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
