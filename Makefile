# `make demo` shows what maskset does, `make test` checks it. Both set up what they need: git, make and Python 3.11 are enough.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SHELL := /bin/bash
BIN := .venv/bin

.PHONY: help demo test test-all lint types docs bench gpu clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt $(wildcard src/maskset/kernels/csrc/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/installed  ## train a small model on generated images, print its AP, draw what it finds
	$(BIN)/maskset demo
	@echo 'Before the first of these in a shell:  source .venv/bin/activate'

test: lint types docs  ## everything that a change must pass
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow'

test-all: lint types docs  ## the same with the tests marked slow
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/installed  ## style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/installed  ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/installed  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/installed  ## measure everything that benchmarks/ tells: an hour on a quiet machine
	for name in attention inference training masks loader evaluation matching twin scaling; do \
		$(BIN)/python -m benchmarks $$name --out benchmarks || exit; \
	done
	$(BIN)/python -m benchmarks attention --threads 2 --out benchmarks
	cp benchmarks/scaling.svg docs/assets/scaling.svg

gpu: .venv/installed  ## check everything that runs on a GPU, in at most 8 minutes; writes benchmarks/results/gpu.json
	$(BIN)/python -m benchmarks gpu

clean:  ## remove what the commands above made
	rm -rf .venv site demo build .pytest_cache .ruff_cache src/maskset.egg-info src/maskset/kernels/_kernels*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
