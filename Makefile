# burnish: `make help` lists the targets.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help

.PHONY: help install quickstart test faults check format bench peers peers-test parity clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP) ## Make .venv with everything for users and developers

# torch first and by itself: a looser requirement would pull gigabytes of CUDA libraries on a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "burnish needs Python 3.11 or newer: run 'make $(MAKECMDGOALS) PYTHON=python3.12'"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install ## Fine-tune the embedded model on the embedded data and show what changed
	@$(BIN)/burnish train recipes/quickstart.yaml
	@$(BIN)/burnish chat runs/quickstart --compare --max-tokens 80 \
	  --prompt "Who are you?" --prompt "How do I reset my password?" --prompt "When is the service desk open?"

# One process a core, one thread each: many small tests gain more from that than from threads inside them.
test: install ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

faults: install ## Kill, corrupt, fill, hang: put faults into real training runs, and print a table
	$(BIN)/python -m tests.faults.suite $(FAULTS)

check: install ## Lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install ## Put the code into its form
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: install ## Measure speed on this machine, beside the tools that make peers has installed
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.sft

peers: ## Make .peers/ with the tools that burnish is compared with
	bash benchmarks/peers.sh

peers-test: ## Train our models with TRL's own trainer, in TRL's environment
	bash benchmarks/peers.sh trl
	OMP_NUM_THREADS=1 .peers/trl/bin/python -m pytest tests/peers

parity: install ## Compare the first 10 steps with TRL
	bash benchmarks/peers.sh trl
	$(BIN)/python -m benchmarks.parity.sft

clean: ## Remove what the targets made (not the runs)
	rm -rf $(VENV) .peers build dist src/*.egg-info
