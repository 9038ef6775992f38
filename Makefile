# make demo     the whole pipeline on the toy world, on this machine; ends with runs/demo/report.html
# make test     all tests but those marked slow, JOBS=2 files at a time; ARGS="-k name" goes to pytest. No test sees a GPU:
#               those for one are `.venv/bin/python -m pytest -m gpu`
# make slow     the slow tests
# make sanitize the op tests on kernels built with AddressSanitizer and UBSan
# make emulate  the same on the CUDA kernels, which then run on the CPU: no GPU needed
# make gpu-sanitize  on a GPU: its op tests under compute-sanitizer, memcheck and racecheck
# make lint     ruff and mypy; `make format` rewrites what ruff asks for
# make bench    every benchmarks/bench_*.py
# make build    only the environment and the kernels; every target above does this first, and again only what changed
# make nvcc     NVIDIA's compiler in build/nvcc, for the test that compiles the CUDA kernels (104 MB of wheels)
# make dali     NVIDIA DALI, the optional second decoder, for its tests (280 MB of wheels)
# make clean    removes what these made, runs/ excepted
#
# PYTHON=python3.12 chooses the interpreter of a new environment, VENV=path its place. setup.py reads SORAHPC_CUDA
# (auto, 0, 1), SORAHPC_NATIVE=0 (no kernels: no compiler needed) and TORCH_CUDA_ARCH_LIST.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

VENV ?= .venv
BIN := $(VENV)/bin
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do $$p -c "$(SUPPORTED)" 2>/dev/null && echo $$p && break; done)
KERNELS := $(wildcard csrc/*.* csrc/*/*.*)
LIBRARY := sorahpc/_ops.abi3.so
# All that nvcc 13.0 asks for; in a folder of its own, since a torch with CUDA has other versions in the environment.
NVCC := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
  nvidia-cuda-cccl==13.0.85
# As the extra `dali` of pyproject.toml, without the package around it.
DALI := nvidia-dali-cuda130
JOBS ?= 2
# One thread a process: tests start several, and idle OpenMP threads cost more than they bring on a small machine.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest

.PHONY: build demo test slow sanitize emulate gpu-sanitize nvcc dali lint format bench clean FORCE

build: $(VENV)/.built

demo: build
	@$(BIN)/sorahpc demo

test: build
	@$(PYTEST) -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

slow: build
	@$(PYTEST) -m slow $(ARGS)

# The op tests on a copy of the package beside its own build of the kernels, with sanitizers. Python itself leaks and is
# not sanitized: the sanitizers' libraries come first by LD_PRELOAD, leaks are not looked for, and what torch allocates is
# seen all the same. $(1): the copy's folder; $(2): what setup.py is told besides; $(3): what pytest is.
define sanitized
@rm -rf build/$(1) && mkdir -p build/$(1)
@cp -r sorahpc build/$(1)/ && rm -f build/$(1)/sorahpc/*.so
@SORAHPC_SANITIZE=1 SORAHPC_CUDA=0 $(2) $(BIN)/python setup.py -q build_ext --build-lib build/$(1) \
  --build-temp build/$(1)/objects
@cd build/$(1) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. OMP_NUM_THREADS=2 $(2) \
  $(abspath $(BIN))/python -m pytest -c ../../pyproject.toml --rootdir ../.. -p no:cacheprovider -q \
  -m "not slow" -n $(JOBS) ../../tests/test_ops_*.py $(3) $(ARGS)
endef

sanitize: build
	$(call sanitized,sanitize,)

# The levels are the CPU kernels', which have no part in it.
emulate: build
	$(call sanitized,emulate,SORAHPC_EMULATE=1,-k "not level")

# On a GPU, under NVIDIA's own. torch then allocates each tensor by itself, so that its ends are seen.
gpu-sanitize: build
	@command -v compute-sanitizer >/dev/null || { echo "make: no compute-sanitizer: it comes with the CUDA toolkit" >&2; exit 1; }
	@for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
	  --error-exitcode 1 $(BIN)/python -m pytest -q -m "gpu and not slow" tests/test_ops_*.py $(ARGS); done

nvcc: build/nvcc/.built

dali: build
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt '$(DALI)'

lint: build
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: build
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: build
	@ls benchmarks/bench_*.py >/dev/null 2>&1 || { echo "make: no benchmarks/bench_*.py here" >&2; exit 1; }
	@for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench; done

clean:
	rm -rf $(VENV) build *.egg-info sorahpc/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 is needed; none found as python3, python3.11, python3.12. \
	Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c "$(SUPPORTED)" || { echo "make: $(PYTHON) is not a working Python 3.11 or 3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) can't make a virtual environment \
	(Debian: apt install python3-venv)" >&2; exit 1; }

# torch first, for its headers: then the package is built against it, without pip fetching a second copy to build with.
$(VENV)/.deps: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools pybind11 torch
	SORAHPC_NATIVE=0 $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.built: $(VENV)/.deps $(KERNELS) $(if $(wildcard $(LIBRARY)),,FORCE)
	@if [ "$${SORAHPC_NATIVE:-1}" = 0 ]; then echo "make: SORAHPC_NATIVE=0: no kernels, the Python references serve"; \
	else $(BIN)/python setup.py -q build_ext --inplace; fi
	@touch $@

# --target adds to a folder: another version would lie beside the old one.
build/nvcc/.built: Makefile | $(BIN)/python
	@rm -rf build/nvcc
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target build/nvcc $(NVCC)
	@touch $@
