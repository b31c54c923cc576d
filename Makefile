# What a newcomer needs:
#   make demo    set-up, then the whole pipeline on the embedded default
#   make emoji   the same on a folder of real images, fetched from npm's registry
#   make test    set-up, then the tests but the slowest, which are make test-slow and make test-nightly
SHELL := /bin/bash
PY := .venv/bin/python
# Of what the tests take, a third is waiting: for processes to start, to end, to be missed.
TESTS := $(PY) -m pytest -q -n 3 --dist worksteal -m
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo emoji test test-slow test-nightly test-mutants test-container lint types docs setup clean
setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt setup.sh
	./setup.sh
	@touch $@

demo: setup
	@$(PY) -m orchestration.run_stage demo --config configs/demo.yaml

emoji: setup
	@$(PY) -m demo.emoji runs/emoji/corpus
	@$(PY) -m orchestration.run_stage all --config configs/emoji.yaml

test: setup
	$(TESTS) 'not slow and not nightly and not container'
	@echo "The slow tests were left out: make test-slow and make test-nightly run them."

test-slow: setup
	$(TESTS) 'slow and not nightly'

test-nightly: setup
	$(TESTS) nightly

test-container: setup
	$(PY) -m pytest -q -n 0 -m container

test-mutants: setup
	$(PY) -m tests.mutants

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup
	.venv/bin/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

clean:
	rm -rf .venv runs/demo site
