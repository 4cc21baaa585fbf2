# One command each; `make` alone lists them. Every target makes the environment it needs first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
BENCH  := $(VENV)/ready-bench
ARGS   ?=
JOBS   ?= 3
N      ?= 100000
SEED   ?= 1
SECONDS ?= 60
MINUTES ?= 10
KILLS  ?= 3

# Ray would otherwise ask at the first start, and then send, how it is used.
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help wheel venv demo test check format e2e schedules simulate race kills gpu learnability netns storm bench-control bench-newest bench-recovery bench-stall bench-steps bench-storage lock clean

help: ## list the targets
	@echo "usage: make TARGET [ARGS='...'] [PYTHON=python3.12]"
	@echo
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(READY) ## make .venv and install the pinned packages into it

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v}: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@if [ ! -x $(BIN)/pip ]; then \
	  echo "making $(VENV) (once)"; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    rm -rf $(VENV); echo "no virtual environment could be made: on Debian and Ubuntu, apt install python3-venv"; exit 1; }; \
	fi
	@echo "installing the packages pinned in requirements.lock (a few minutes the first time, about 2 GB)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

$(BENCH): $(READY) requirements-bench.lock
	@echo "installing what the benchmarks compare with, pinned in requirements-bench.lock"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.lock
	@touch $(BENCH)

demo: $(READY) ## a sweep on this machine with a kill in the middle: no GPU, no account
	@$(BIN)/orchestrate demo $(ARGS)

test: $(READY) ## unit and conformance tests, in JOBS processes (JOBS=0: in this one)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not e2e and not gpu and not netns" -n $(JOBS) --dist loadfile $(ARGS)

check: $(READY) ## formatting, lint, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY) ## format the tree and fix what can be fixed safely
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

e2e: $(READY) ## minutes on real Ray with real kills; the last line is one JSON object
	$(BIN)/python -m pytest tests/e2e -m e2e -n 2 --dist loadfile $(ARGS)

schedules: $(READY) ## N random histories of a run from SEED on; the last line is one JSON object
	@PYTHONPATH=tests $(BIN)/python -m proof.schedules -n $(N) --seed $(SEED) $(ARGS)

simulate: $(READY) ## N random histories of a sweep from SEED on; the last line is one JSON object
	@PYTHONPATH=tests $(BIN)/python -m proof.control -n $(N) --seed $(SEED) $(ARGS)

race: $(READY) ## eight writers for SECONDS on each real store; the last line is one JSON object
	@PYTHONPATH=tests $(BIN)/python -m proof.race --seconds $(SECONDS) $(ARGS)

kills: $(READY) ## each method killed KILLS times at random moments, from SEED on; the last line is JSON
	@PYTHONPATH=tests $(BIN)/python -m proof.kills --kills $(KILLS) --seed $(SEED) $(ARGS)

gpu: $(READY) ## tests that need a CUDA device, and real-size memory and speed; the last line is JSON
	$(BIN)/python -m pytest -m gpu
	@$(BIN)/python benchmarks/peak_memory.py
	@$(BIN)/python benchmarks/real_size.py $(ARGS)

learnability: $(READY) ## does each adapter and objective learn? half an hour; the last line is JSON
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/learnability.py $(ARGS)

netns: $(READY) ## real faults on network namespaces, a row each; needs root; the last line is JSON
	$(BIN)/python -m pytest tests/netns -m netns $(ARGS)

storm: $(READY) ## random faults on namespaces over a sweep for MINUTES, from SEED on; needs root
	@PYTHONPATH=tests $(BIN)/python -m proof.storm --seed $(SEED) --minutes $(MINUTES) $(ARGS)

bench-control: $(READY) ## ticks of the controller over 1,000 to 100,000 runs on 1,000 slots
	@$(BIN)/python benchmarks/control.py $(ARGS)

bench-newest: $(READY) ## starting from a snapshot of long logs and many runs, beside reading them
	@$(BIN)/python benchmarks/newest.py $(ARGS)

bench-recovery: $(BENCH) ## work and time lost to each fault, ours beside Ray Tune; without root to a kill
	@PYTHONPATH=tests $(BIN)/python benchmarks/recovery.py $(ARGS)

bench-stall: $(BENCH) ## how long a checkpoint holds up the training step
	@$(BIN)/python benchmarks/stall.py $(ARGS)

bench-steps: $(BENCH) ## steps per second, ours beside diffusers' own script; families and adapters
	@$(BIN)/python benchmarks/real_size.py --family digits --family small-sdxl --adapter all
	@$(BIN)/python benchmarks/steps.py $(ARGS)

bench-storage: $(BENCH) ## uploads and downloads beside other tools, slow uplinks, age of the newest commit
	@$(BIN)/python benchmarks/object_storage.py $(ARGS)

wheel: $(READY) ## build the wheel into dist/, for the cluster file under infra/
	@rm -rf build dist
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist . && rm -rf build
	@ls dist

lock: $(READY) ## write requirements.lock and requirements-bench.lock from pyproject.toml
	@$(BIN)/python .ci/lock.py

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
