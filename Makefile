# `make demo` shows what hallubench does, `make test` checks it. Both set everything up first.

BIN := .venv/bin

# A folder with another instruction model may take its place.
export HALLUBENCH_DEMO_MODEL ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hallubench/SmolLM2-135M-Instruct

.PHONY: help setup demo test test-fast bench lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile

setup: .venv/installed ## install everything into .venv, unless it is there

# Made last, so that an install that was cut off is done again.
.venv/installed: pyproject.toml .ci/setup
	@.ci/setup
	@touch $@

demo: setup ## a small real model answers 45 prompts at two temperatures
	TQDM_DISABLE=1 $(BIN)/python configs/demo_model.py "$$HALLUBENCH_DEMO_MODEL"
	$(BIN)/hallubench generate --config configs/demo.yaml
	$(BIN)/hallubench export-json results/demo
	$(BIN)/python configs/demo.py

test: lint ## every check and every test
	$(BIN)/python -m pytest

test-fast: lint ## without the tests that load an engine or take seconds
	$(BIN)/python -m pytest -m "not engine and not slow and not live"

bench: setup ## every benchmark in turn
	@for benchmark in $(wildcard tests/benchmarks/bench_*.py); do \
		echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; \
	done

lint: setup ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what tools left; never results, models or .venv
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find hallubench tests configs -name __pycache__ -prune -exec rm -rf {} +
