# `make run` drives the simulated arm; `make test` is everything CI runs. Both need nothing but Python 3.10-3.12.
PYTHON ?= python3
# The CPU build is enough for everything here; set TORCH to take another one.
TORCH ?= torch==2.13.0
BIN := .venv/bin
RUN_ARGS ?=

.PHONY: run test check fast train evaluate clean system

run: .venv/installed-run
	$(BIN)/onbeat run $(RUN_ARGS)

test: .venv/installed-test check
	$(BIN)/python -m pytest -m "slow or not slow" -ra

fast: .venv/installed-test
	$(BIN)/python -m pytest

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

.venv/bin/python: | system
	$(PYTHON) -m venv .venv

.venv/installed-run: setup.py .venv/bin/python
	$(BIN)/pip install --quiet -e '.[sim]'
	touch $@

# torch by itself first: no other package may choose its build.
.venv/installed-test: setup.py .venv/bin/python
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[sim,train,export,dev]'
	touch $@ .venv/installed-run

system:
	@sh drivers/twin/system-packages.sh $(PYTHON)

clean:
	rm -rf .venv build *.egg-info out
