# Every target sets up what it needs: .venv with the packages of pyproject.toml. No system packages beyond
# Python 3.10 or newer (with venv), make, and git; for "make test" also Java, which it installs where it can.

PYTHON ?= python3
# What to install torch from, ahead of everything else; "make TORCH=torch" takes the newest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export MPLBACKEND := Agg

.PHONY: demo test java check bench docs wheel clean

demo: .venv/demo
	$(BIN)/python -m otfuse demo --out demo-out

test: .venv/dev java
	$(BIN)/python -m pytest -n 2 tests benchmarks examples/lavcap/tests

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-enable

docs: .venv/demo
	$(BIN)/python docs/make_api.py

# METEOR and the tokeniser of captions (examples/lavcap) are Java programs; without one their tests are skipped.
java:
	@command -v java >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update \
			&& DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends default-jre-headless; } \
		|| echo "no java, and it could not be installed: install one (Debian: default-jre-headless) to test the scores"

wheel: .venv/dev
	$(BIN)/python -m build

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/demo .venv/bench: .venv/%: .venv/torch pyproject.toml setup.py
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

.venv/dev: .venv/torch pyproject.toml setup.py examples/lavcap/pyproject.toml
	$(BIN)/pip install --quiet --editable ".[dev]" --editable "examples/lavcap[test]"
	touch $@

clean:
	rm -rf .venv build dist demo-out *.egg-info
