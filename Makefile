# `make demo` and `make test` do all the set-up themselves: a virtual environment, pinned dependencies, the compiled extension.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup demo test check docs bench package gpu train-demo clean

setup: $(VENV)/.built

demo: setup
	$(BIN)/liftbyimage demo

test: setup
	$(BIN)/python -m pytest $(TEST_FLAGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in site/: a broken link, an anchor that is not there or a page outside the contents is an error.
# Not --quiet: mkdocs then counts no warnings, and strict lets everything pass.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

# The source archive and a wheel from it, in build/packages, tried in an environment that knows nothing of this folder.
# LIFTBYIMAGE_MARCH=x86-64-v3 makes a wheel for other machines than this one.
package: setup
	rm -rf build/packages
	$(BIN)/python -m pytest tests/test_packaging.py --packages-into build/packages
	@ls -l build/packages

train-demo: setup
	$(BIN)/liftbyimage train-demo

# On a machine with an NVIDIA GPU and its own torch: build with the local nvcc, run every test that touches the GPU (none
# may skip for want of one), compute-sanitizer and the benchmarks, in 9 minutes. GPU_FLAGS="--list" says which parts.
gpu:
	$(PYTHON) bench/gpu.py $(GPU_FLAGS)

clean:
	rm -rf $(VENV) build *.egg-info liftbyimage/*.so liftbyimage/_C.instructions

$(VENV)/.dependencies: constraints.txt
	@echo "setting up $(VENV): a minute or two, more for a slow network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement constraints.txt
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@echo "compiling the native modules: two minutes on two cores"
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
