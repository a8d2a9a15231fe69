# Needs Python 3.11 or 3.12, make and git; uv is fetched into .uv/ when it is missing.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN = $(UV) run --no-sync
# Several threads to one operation of a small model cost more than they bring; set it for a large one.
export OMP_NUM_THREADS ?= 1

N ?= 1000

.PHONY: demo test test-slow faults support bench gpu lint types docs sync sync-dev

demo: sync
	$(RUN) clplat run demo/digits

test: sync-dev
	$(RUN) pytest -q -n auto --dist worksteal --durations=15

test-slow: sync-dev
	$(RUN) pytest -q -n auto --dist worksteal -m "slow and not thorough" --durations=40

# Kills at N random moments over all strategies, half as many damaged files through every reader, and the fault tests.
faults: sync-dev
	$(RUN) python tests/faults/kills.py --cases $(N)
	$(RUN) python tests/faults/fuzz.py --cases $$(($(N) / 2))
	$(RUN) pytest -q -n auto --dist worksteal -m "slow or not slow" tests/faults tests/ddp

# What each strategy is seen to do and on what; clplat/commands/support.json holds it, docs/support.md shows it.
support: sync-dev
	CLPLAT_SUPPORT=record $(RUN) pytest -q -n auto --dist worksteal -m support
	$(RUN) python docs/generate.py

bench: sync-dev
	$(RUN) python -m benchmarks

# What a GPU has to show, in eight minutes at most; without one it says so.
gpu: sync-dev
	$(RUN) python -m benchmarks.gpu

lint: sync-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: sync-dev
	$(RUN) mypy

docs: sync-dev
	$(RUN) mkdocs build --strict

sync: $(UV)
	$(UV) sync --locked --inexact

sync-dev: $(UV)
	$(UV) sync --locked --group dev

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check "uv>=0.5"
