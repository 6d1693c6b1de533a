# `make run` drives the simulated arm; `make test` is everything CI runs. Both need nothing but Python 3.10 to 3.12.
PYTHON ?= python3
# The CPU build is enough for everything here; set TORCH to take another one.
TORCH ?= torch==2.13.0
RUN_ARGS ?=
BIN := .venv/bin
# Idle worker threads that spin cost more than they bring on small machines.
export OMP_NUM_THREADS ?= 1

.PHONY: run test fast check lerobot-check soak train bundle evaluate clean system

run: .venv/installed-run
	$(BIN)/onbeat run $(RUN_ARGS)

# What only computes runs on every core; loops, twins and clocks then have the machine for themselves, the soak last.
test: check
	$(BIN)/python -m pytest -m "not alone" -n logical --maxprocesses 4 --dist loadfile --durations=20
	$(BIN)/python -m pytest -m alone --durations=20

fast: .venv/installed-test
	$(BIN)/python -m pytest

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

# Success of the shipped policy over 50 fresh worlds, beside its controls: some ten minutes.
evaluate: .venv/installed-test
	$(BIN)/onbeat evaluate --seeds 50 --control all

# Every fault on the twin, judged on the wire: the four minutes at the end of `make test`.
soak: .venv/installed-test
	$(BIN)/python -m pytest -m soak

# LeRobot's own loader on what we write, ours on what it writes; in an environment of its own (8 GB) under out/.
LEROBOT ?= lerobot==0.4.4
LEROBOT_BIN ?= out/lerobot-venv/bin
lerobot-check: .venv/installed-test
	test -x $(LEROBOT_BIN)/python || ($(PYTHON) -m venv out/lerobot-venv && $(LEROBOT_BIN)/pip install --quiet '$(LEROBOT)')
	rm -rf out/lerobot-check
	$(BIN)/python tests/lerobot_check/ours.py write out/lerobot-check/ours
	HF_HUB_OFFLINE=1 SVT_LOG=1 $(LEROBOT_BIN)/python tests/lerobot_check/theirs.py out/lerobot-check/ours out/lerobot-check/theirs
	$(BIN)/python tests/lerobot_check/ours.py read out/lerobot-check/theirs

# From nothing to the bundle that ships, in about an hour: docs/decisions/0011-first-policy.md.
train: .venv/installed-test
	test -d out/demonstrations || $(BIN)/python -m onbeat.training.demonstrations --episodes 960 --seed 1000 --workers 2 --out out/demonstrations
	$(BIN)/onbeat train training/configs/so101_lift.toml --data out/demonstrations --out out/checkpoint
	$(BIN)/onbeat export out/checkpoint out/so101-lift --embodiment so101

# The shipped bundle from the shipped checkpoint.
bundle: .venv/installed-test
	$(BIN)/onbeat export checkpoints/so101-lift bundles/so101-lift --embodiment so101 --replace

.venv/bin/python: | system
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/installed-run: setup.py .venv/bin/python
	$(BIN)/pip install --quiet -e '.[sim]'
	touch $@

# torch by itself first: no other package may choose its build.
.venv/installed-test: setup.py .venv/bin/python
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[sim,train,export,view,dev]'
	touch $@ .venv/installed-run

system:
	@sh drivers/twin/system-packages.sh $(PYTHON)

clean:
	rm -rf .venv build *.egg-info out
