# Every target begins with `setup`, which takes a fraction of a second when nothing is to do.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin

.PHONY: help setup demo test test-systems check lint types layers wheel dist format bench bench-systems clean

help: ## these lines
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: ## Debian packages (where root or sudo is at hand) and .venv with StageFS and its tools
	@tools/setup.sh

demo: setup ## three tasks share one remote input that is fetched once; checks what it claims
	@$(BIN)/python tools/demo/demo.py

test: setup ## the whole test suite, in several processes; ARGS='-k name' is handed to pytest
	@$(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal $(ARGS)

test-systems: setup ## RADICAL-Pilot and Parsl themselves on a mount, installed into .venvs; ARGS as above
	@tools/test_systems.sh $(ARGS)

check: lint types layers wheel ## ruff, mypy, import-linter, the contents of the wheel

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports --no-logo

wheel: setup
	tools/check/wheel.sh

dist: setup ## dist/stagefs-VERSION-linux-x86_64.tar.gz: runs where only fusermount3 and glibc are
	@vagrant/provision/debian.sh patchelf binutils
	@$(BIN)/python -m relocatable $(ARGS)

format: setup ## let ruff put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup ## StageFS beside sshfs, rclone, s3fs, bindfs, scp and a local file, as ratios
	@$(BIN)/python -m bench $(ARGS)

bench-systems: setup ## RADICAL-Pilot, Parsl and Pilot-Data with and without StageFS; ARGS='--mib 128 --pairs 1'
	@$(BIN)/python -m bench.systems $(ARGS)

clean: ## what the targets above leave in the checkout
	rm -rf .venv .venvs .demo .bench dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
