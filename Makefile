# make train | test | check | test-slow | bench | docs. Each makes the .venv it needs.
#
# On a machine without a GPU, torch's CPU build is a tenth of the download:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
STAMP := .venv/installed
JOB ?= jobs/quickstart.toml
RUN ?= runs/quickstart
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Modules are compiled once, where they are first imported, not by each process: pip would compile all of them
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test check test-slow test-gpu bench docs clean

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile "torch==$(TORCH)" -e ".[dev]"
	touch $@

# Prints what a line took: $(call timed,name,command)
timed = @start=$$(date +%s.%N); echo "== $(1): $(2)"; $(2) || exit $$?; \
	echo "== $(1) took $$(echo "$$(date +%s.%N) $$start" | awk '{printf "%.1f", $$1-$$2}') s"

train: $(STAMP)
	$(call timed,calibrate,$(BIN)/partita calibrate)
	$(call timed,train,$(BIN)/partita train $(JOB))
	$(call timed,verify,$(BIN)/partita verify $(JOB))
	$(call timed,report,$(BIN)/partita report $(RUN))

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	TURNS=few $(PYTEST) tests/house tests/pure -m "not slow" $(LATER) $(TOGETHER)

# What examples and pages run is left to `make test`
LATER := --ignore=tests/house/test_examples.py --deselect=tests/house/test_docs.py::test_python_blocks_run \
	--deselect=tests/house/test_docs.py::test_readmes_commands_run

# Thread ranks of one process share a core, and ranks that are processes wait much: two workers. (Three took a
# third more where two cores are two threads of one.) What holds real time to stated time (the mark `timed`)
# runs afterwards, one on each core.
TOGETHER := -n 2 --dist worksteal --session-timeout=1500 --durations=10
ALONE := -n 2 --dist worksteal --session-timeout=1500 --durations=5
TIMED := $(shell grep -rl --include='test_*.py' 'mark\.timed' tests)

test: $(STAMP)
	$(PYTEST) tests -m "not (slow or gpu or browser or timed)" $(TOGETHER)
	$(PYTEST) $(TIMED) -m "timed and not (slow or gpu)" $(ALONE)

test-slow: $(STAMP)
	$(PYTEST) tests -m "(slow or browser) and not (gpu or timed)" $(TOGETHER) $(SLOW)
	$(PYTEST) $(TIMED) -m "timed and slow and not gpu" $(ALONE)

# On one GPU, by the Python that has torch for it, from the source tree: make test-gpu PYTHON=python3
test-gpu:
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PYTHON) -m pytest tests/gpu -m gpu -p no:cacheprovider

bench: $(STAMP)
	$(BIN)/python -m pip install -q -e ".[bench]"
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.predictions

docs: $(STAMP)
	$(BIN)/partita draw gpipe 1f1b -p 4 -m 8 --costs 1,1,1 --svg docs/schedules.svg > /dev/null
	$(BIN)/python tests/pure/schedule_docs.py
	$(BIN)/python tests/house/files_docs.py
	$(BIN)/python tests/local/covering_docs.py
	$(PYTEST) tests/house/test_docs.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
