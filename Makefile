# Every target sets up what it needs: .venv with the packages of pyproject.toml. No system packages beyond
# Python 3.10 or newer (with venv), make, and git; and a C++ compiler for the tests of the kernels for Gaudi.

PYTHON ?= python3
# What to install torch from, ahead of everything else; "make TORCH=torch" takes the newest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export MPLBACKEND := Agg

.PHONY: demo test compiler check bench docs wheel clean

demo: .venv/demo
	$(BIN)/python -m otfuse demo --out demo-out

test: .venv/dev compiler
	$(BIN)/python -m pytest -n 2 tests benchmarks

# Installed where that can be done without a question; otherwise the tests that need it skip and say so.
compiler:
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || command -v c++ >/dev/null || \
	(apt-get update -qq && apt-get install -qq -y g++) >/dev/null 2>&1 || \
	(sudo -n apt-get update -qq && sudo -n apt-get install -qq -y g++) >/dev/null 2>&1 || \
	echo "no C++ compiler, and apt could not install g++: the TPC emulator's tests will skip"

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-enable

docs: .venv/demo
	$(BIN)/python docs/make_api.py

wheel: .venv/dev
	$(BIN)/python -m build

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/demo .venv/dev .venv/bench: .venv/%: .venv/torch pyproject.toml setup.py
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv build dist demo-out *.egg-info
