# Retune. `make run` and `make test` each work as the first command on a fresh clone; Python 3.11+, git and make are enough.
# Everything they create stays in this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_SITE_CACHE_DIR := $(CURDIR)/.retune/dvc
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1

.PHONY: run test test-integration test-browser test-faults test-gpu check bench bench-stages bench-data bench-train bench-evaluate bench-merge bench-store bench-flow bench-gpu sample lock clean help

help:                ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

run: $(READY)        ## run the whole loop once: data, training, evaluation, merge, publish, promotion (4 to 7 minutes)
	@echo "Bringing the loop up to date: 4 to 7 minutes on 2 cores the first time, seconds if nothing has changed."
	@retune run

test: $(READY)       ## run all tests that need no PostgreSQL, browser or GPU (about 9 minutes)
	@echo "Testing: about 9 minutes on 2 cores."
	@python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

test-integration: $(READY)  ## test the team servers without containers (needs PostgreSQL) and the guide's own-data chapter (about half an hour)
	@python -m pytest -q -m integration tests

test-browser: $(READY)  ## test the reports and the dashboard in a real browser (needs Chromium; about 4 minutes)
	@python -m pytest -q -m browser tests

test-faults: $(READY)  ## test every kill and fault, in full (about an hour and a half)
	@RETUNE_TESTS_REAL=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m faults tests

test-gpu: $(READY)   ## test what needs a CUDA GPU: its kernels, its memory, the sample on it (at most 5 minutes; skipped without one)
	@python -m pytest -q -m gpu tests/gpu

check: $(READY)      ## check formatting, lint and types
	@ruff format --check .
	@ruff check .
	@mypy

bench: bench-stages bench-data bench-train bench-evaluate bench-merge bench-store bench-flow  ## run every benchmark except bench-gpu

bench-stages: $(READY)  ## print time and peak memory by stage of the last run
	@python -m tests.bench stages

bench-data: $(READY)  ## compare ingest and prepare with datasets.map and datasketch (about 4 minutes)
	@python -m tests.bench.data

bench-train: $(READY)  ## compare train with `trl sft` and its defaults, on rows of the last prepare (about 8 minutes)
	@python -m tests.bench train

bench-evaluate: $(READY)  ## compare generation in slots with transformers' fixed batches (about 3 minutes)
	@python -m tests.bench evaluate

bench-merge: $(READY)  ## compare merging shard by shard with PEFT: time, peak memory (about 4 minutes, 9 GB of disk)
	@python -m tests.bench merge

bench-store: $(READY)  ## compare the artifact store with boto3's upload_file (about 1 minute)
	@python -m tests.bench store

bench-flow: $(READY)  ## compare the flow with dvc repro, and time runs with nothing to do (about 10 minutes)
	@python -m tests.bench.flow

bench-gpu: $(READY)  ## compare training and generation of an 8B model with `trl sft` on this GPU (at most 8 minutes, 20 GB of disk)
	@python -m tests.bench.gpu

sample: $(READY)     ## recreate the sample data and base model (about 10 minutes)
	python -m infra.sample.instructions
	python -m infra.sample.pretrain
	dvc add data
	grep -q 'remote: sample' data.dvc || echo '  remote: sample' >> data.dvc
	dvc push --remote sample data.dvc

lock:                ## resolve requirements.lock again (needs uv, and UV_FIND_LINKS naming a CPU build of torch)
	uv pip compile pyproject.toml --group dev --python-version 3.11 --no-header -q | sed 's/+cpu$$//' > requirements.lock

clean:               ## remove outputs, caches, servers' state and the environment; keep data, store and registry
	-@test ! -x $(BIN)/retune || $(BIN)/retune down
	rm -rf artifacts .retune .pytest_cache .ruff_cache .mypy_cache *.egg-info $(VENV)

# Rebuilt when the lock changes, with stock pip in one pass. Nothing is cached outside this folder.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python {v[0]}.{v[1]} is too old: Retune needs 3.11 or newer (make PYTHON=python3.12 …)")'
	@command -v git >/dev/null || { echo "git is not installed, and DVC needs it: apt-get install git, brew install git, …"; exit 1; }
	@echo "Installing the locked packages into $(VENV): about 2 minutes and 2.2 GB, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-cache-dir -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --editable .
	@$(BIN)/python -m pip check
	@touch $@
