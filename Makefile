# Every command a person or a machine needs. `make` alone prints this list.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Processes that run tests, a file at a time.
TESTERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check unit chaos corpora docs bench bench-control bench-scale up clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 15

setup: $(INSTALLED) ## create the environment in .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "codeherd needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,embedded,monitor,dev]'
	@touch $@

demo: $(INSTALLED) ## set up, run the main job on real code, show the answers
	$(BIN)/python docs/demo.py

test: $(INSTALLED) check unit ## everything: style, types, floors, and all tests on real services

check: $(INSTALLED) ## style, types, import floors, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(INSTALLED) ## all tests with coverage
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

chaos: $(INSTALLED) ## all chaos tests, with storms of 2,000 jobs; CHAOS_SEED=n replays one
	CHAOS_JOBS=$${CHAOS_JOBS:-2000} $(BIN)/python -m pytest -s tests/chaos

corpora: $(INSTALLED) ## document other people's code, FOLDERS="...", and prove that nothing else changed
	$(BIN)/python -m tests.corpora $(FOLDERS) --text accepting
	$(BIN)/python -m tests.corpora $(FOLDERS) --text nasty

docs: $(INSTALLED) ## write the generated parts of docs/ anew
	$(BIN)/python docs/generate.py

bench: $(VENV)/.installed-bench ## measure against peers; writes benchmarks/results/
	$(BIN)/python -m benchmarks.run --write

# llama.cpp is compiled for this very processor: 10 to 20 minutes, once.
$(VENV)/.installed-bench: $(INSTALLED)
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

bench-control: $(VENV)/.installed-bench-control ## measure the queue against peers; writes benchmarks/results/
	$(BIN)/python -m benchmarks.control.run --write

$(VENV)/.installed-bench-control: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench-control,dev]'
	@touch $@

bench-scale: $(INSTALLED) ## measure how far the service scales; writes benchmarks/results/
	$(BIN)/python -m benchmarks.scale --write

up: $(INSTALLED) ## start the embedded stack in this terminal
	$(BIN)/codeherd up

clean: ## remove the environment and everything generated
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* .codeherd
