# Every target sets up what it needs: .venv with the packages of pyproject.toml. System packages: Python 3.10 or newer (with
# venv), make and git; for "make test" also a C++ compiler, Java and Chromium, which it installs where it can.

PYTHON ?= python3
# What to install torch from, ahead of everything else; "make TORCH=torch" takes the newest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Of benchmarks: where results go, when to start no further case, and further options, as BENCH="--clock processor".
RESULTS ?= benchmarks/results
MINUTES ?= 15
BENCH ?=
export MPLBACKEND := Agg

.PHONY: demo test test-cpus mutants compiler java chromium check bench report resources docs wheel clean

demo: .venv/demo
	$(BIN)/python -m otfuse demo --out demo-out

test: .venv/dev compiler java chromium
	$(BIN)/python -m pytest -n 2 tests benchmarks examples/lavcap/tests

# The bounds that rounding and a library's buffers could move, on the code that torch and MKL run on other processors.
test-cpus: .venv/dev compiler
	for setting in ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE; do echo $$setting; env $$setting \
		$(BIN)/python -m pytest -q tests/test_testing.py tests/test_memory.py tests/test_tpc_model.py tests/test_tpc_kernels.py \
		-k "not test_sinkhorn_is_as_accurate" || exit 1; done

# Faults put into the code, one at a time: which of them the tests notice (an hour).
mutants: .venv/dev compiler
	$(BIN)/python tests/mutants.py

# The kernels for Gaudi run in an emulator in C++; METEOR and the tokeniser of captions (examples/lavcap) are Java programs;
# its pages are tested in a browser.
compiler:
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || command -v c++ >/dev/null || $(call apt,g++)

java:
	@command -v java >/dev/null || $(call apt,default-jre-headless)

chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
		|| command -v google-chrome-stable >/dev/null || $(call apt,chromium)

apt = { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y $(1); } \
	>/dev/null 2>&1 || echo "$(1) is missing, and apt-get could not install it: tests that need it are skipped"

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench
	OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false $(BIN)/python -m pytest benchmarks --benchmark-enable \
		--out $(RESULTS) --minutes $(MINUTES) $(BENCH)

report: .venv/bench
	$(BIN)/python -m benchmarks.report $(sort $(wildcard $(RESULTS)/*.json)) --page docs/measured.md \
		--html build/measured.html --speed docs/images/speed.svg

# Registers and spills of every kernel that is launched, on every target: hours.
resources: .venv/dev
	$(BIN)/python -m benchmarks.compiler.table

docs: .venv/demo
	$(BIN)/python docs/make_api.py

wheel: .venv/dev
	$(BIN)/python -m build

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/demo: .venv/torch pyproject.toml setup.py
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

.venv/dev .venv/bench: .venv/%: .venv/torch pyproject.toml setup.py examples/lavcap/pyproject.toml
	$(BIN)/pip install --quiet --editable ".[$*]" --editable "examples/lavcap[test]"
	touch $@

clean:
	rm -rf .venv build dist demo-out *.egg-info
