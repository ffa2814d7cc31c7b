# Every target sets up all that it needs, once.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
CORES ?= all
# Folder that holds the data sets, each in a folder of its own name.
export DATA_ROOT ?= $(firstword $(wildcard data ../shared/data) data)
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help demo named experiment test lint clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1@/' | column -t -s @

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(VENV)/bin/pip install --quiet --requirement requirements-dev.txt
	@touch $@

named:
	@test -f "configs/experiments/$(NAME).yaml" || { echo "error: no configs/experiments/$(NAME).yaml; name one of these as NAME=…:"; \
		ls configs/experiments; exit 2; }

experiment: named $(VENV)/.run  ## Run configs/experiments/NAME.yaml, or go on where it stopped (DATA_ROOT=folder of the data sets)
	@mkdir -p runs
	@root=configs/experiments/$(NAME).yaml; \
	while next=$$(sed -nE 's/^extends: *"?([^" #]+).*/\1/p' $$root 2>/dev/null); [ -n "$$next" ]; do root=$$next; done; \
	flock --nonblock --conflict-exit-code 3 runs/.$$(basename $$root .yaml).lock \
		$(VENV)/bin/snakemake --snakefile workflow/Snakefile --configfile configs/experiments/$(NAME).yaml \
		--cores $(CORES) --rerun-incomplete --nolock --quiet rules \
		|| { code=$$?; [ $$code -ne 3 ] || \
		echo "error: this experiment, or one that shares networks with it, is already running"; exit $$code; }

demo:  ## Run the whole chain on phantoms: real, plain and chosen samples, and the report
	@$(MAKE) --no-print-directory experiment NAME=demo

lint: $(VENV)/.dev  ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint  ## Check style and types and run the tests
	$(VENV)/bin/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

clean:  ## Remove the environment (runs/ stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .snakemake
