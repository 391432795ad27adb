# Each target first sets up what it needs, in $(VENV), and is a no-op where that is done already.

PYTHON ?= python3
VENV ?= .venv
# Installed only where no torch that is new enough can be imported. Pinned: the newest one is a download
# of several GB.
TORCH ?= torch==2.13.0
# More arguments for pytest, or for the script that runs.
ARGS ?=
# Of make gpu: some of build, tests, sanitize and bench; all without.
PARTS ?=

ifneq ($(words $(VENV)),1)
$(error VENV is one path without spaces, got "$(VENV)"; make takes spaces apart)
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
SOURCES := $(shell find csrc -type f 2>/dev/null)
COMPILED := $(filter %.cpp %.cu,$(SOURCES))
LOG := build/build.log

# Another torch than the extension was built for means another build; so does an extension that is gone.
STALE := $(shell '$(PY)' -c 'import importlib.metadata as m, json; \
	exit(json.load(open("bnfused/_build_info.txt"))["torch"] != m.version("torch"))' 2>/dev/null \
	|| echo FORCE)
# A build option that is set may be another than last time; ninja compiles only what it changes.
ifneq ($(BNFUSED_CUDA)$(TORCH_CUDA_ARCH_LIST),)
STALE := FORCE
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help build demo demo-sync test sanitize fuzz mutate lint bench cuda-check cuda-check-all cuda-build gpu wheel clean FORCE

help:
	@echo 'make demo    train a small network with bnfused and with torch, convert a ResNet-18, and compare'
	@echo 'make demo-sync   train it on two processes with SyncBatchNorm, and in one, and compare'
	@echo 'make test    run the tests'
	@echo 'make sanitize  run the kernels, those of CUDA too, under AddressSanitizer, on the CPU'
	@echo 'make fuzz    compare random calls with torch for a minute, guided by the code that they reach'
	@echo 'make mutate  plant small faults in the CUDA kernels, one at a time, and say which test finds each'
	@echo 'make lint    ruff, mypy and clang-format'
	@echo 'make bench   time bnfused and torch on this machine'
	@echo 'make build   set up $(VENV) and compile the extension, which demo, test and bench do too'
	@echo 'make cuda-check   compile and inspect the CUDA kernels, without a GPU; needs nvcc'
	@echo 'make cuda-build   build and import with a CUDA build of torch, without a GPU; downloads 0.5 GB'
	@echo 'make gpu     on a machine with a GPU: build, test and time the CUDA kernels, without $(VENV)'
	@echo 'make wheel   build a source distribution, and a wheel for the torch of $(VENV), in dist/'
	@echo 'make clean   remove what was built; $(VENV) stays'
	@echo
	@echo 'PYTHON=python3.12   the Python to set up $(VENV) with'
	@echo 'VENV=path           another environment; one that exists is used as it is'
	@echo 'ARGS="-k frozen"    more arguments for pytest, or for the script that runs'

build: $(VENV)/.extension

demo: $(VENV)/.extension
	@$(PY) examples/train_digits.py $(ARGS)
	@$(PY) examples/convert_resnet18.py --no-environment

demo-sync: $(VENV)/.extension
	@OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 2 \
	  examples/train_digits_sync.py $(ARGS)

# Only the pinned plugins: $(VENV) sees the system's packages, and so whatever pytest plugins are there. A process for
# each CPU, which takes the next file when it is done with one, in alphabetical order: the last ones are short. With as
# many processes as CPUs, threads that spin while they wait take the CPU from the one that they wait for.
test: $(VENV)/.extension $(VENV)/.networks
	@PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -p _hypothesis_pytestplugin \
	  -p xdist.plugin -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

sanitize: $(VENV)/.extension
	@PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PY) -m pytest -p _hypothesis_pytestplugin --sanitize \
	  tests/kernels/test_emulator.py tests/kernels/test_emulated_kernels.py $(ARGS)
	@PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONPATH=tests $(PY) -m tools.instrumented pytest -p _hypothesis_pytestplugin \
	  -p no:cacheprovider -k 'not reference and not emulated and not is_lost' \
	  $(patsubst %,tests/package/test_%.py,functional load numerics properties) $(ARGS)

# ARGS="--seconds 3600" for longer.
fuzz: $(VENV)/.extension
	@PYTHONPATH=tests $(PY) -m tools.instrumented fuzz $(ARGS)

# ARGS="layout.cuh pack.cuh" for the faults of these files.
mutate: $(VENV)/.extension
	@PYTHONPATH=tests $(PY) -m tools.mutate $(ARGS)

lint: $(VENV)/.tools
	@echo 'ruff check'
	@$(PY) -m ruff check --quiet --output-format=concise .
	@echo 'ruff format --check'
	@$(PY) -m ruff format --quiet --check .
	@echo 'mypy'
	@$(PY) -m mypy
	@echo 'clang-format'
	@find csrc tests \( -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) -exec \
	  $(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror {} +

bench: $(VENV)/.extension
	@$(PY) benchmarks/bench.py $(or $(ARGS),--quick)

# What follows needs nvcc, and the first three no GPU. A folder of their own each, so that the extension in bnfused/
# stays what it is.
cuda-check cuda-check-all: $(VENV)/.tools
	@PATH="$$(cd '$(VENV)/bin' && pwd):$$PATH" $(PY) tests/cuda_build/check.py $(if $(filter %-all,$@),--all) $(ARGS)

cuda-build: $(VENV)/.tools
	@PATH="$$(cd '$(VENV)/bin' && pwd):$$PATH" $(PY) tests/cuda_build/link.py $(ARGS)

# With the Python that has the GPU's torch, as it is: nothing is installed. PARTS="build tests" for some of it;
# RESULTS=folder and COMMIT=name, which go there by themselves, for what it writes.
gpu:
	@PYTHON='$(PYTHON)' PARTS='$(PARTS)' bash .ci/gpu $(ARGS)

# Left-over files in build/lib* would go into the wheel.
wheel: $(VENV)/.extension
	@rm -rf dist build/lib* build/bdist*
	@$(PY) -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >build/wheel.log 2>&1 && \
	  $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist . >>build/wheel.log 2>&1 || { \
	    tail -n 30 build/wheel.log; exit 1; }
	@ls dist/*

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f bnfused/_C*.so bnfused/_build_info.txt '$(VENV)/.extension'
	find bnfused tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# The environment sees the system's packages, so that a torch that is installed there is used.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'bnfused needs Python 3.10 or newer; choose one with make PYTHON=python3.12'; exit 1; }
	@echo 'making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv --system-site-packages '$(VENV)'

$(VENV)/.torch: | $(PY)
	@if $(PY) -c 'import torch; exit([int(n) for n in torch.__version__.split(".")[:2]] < [2, 11])' \
	    2>/dev/null; then \
	  echo 'using the torch that is installed'; \
	else \
	  echo 'installing $(TORCH)'; $(PIP) install -qq $(TORCH); \
	fi
	@touch $@

$(VENV)/.tools: requirements-dev.txt $(VENV)/.torch
	@echo 'installing the pinned tools of requirements-dev.txt'
	@$(PIP) install -qq -r requirements-dev.txt
	@touch $@

# Without what they depend on, which is there, and only where they are missing: each torchvision asks for one torch, and
# pip would replace the one that is installed.
$(VENV)/.networks: requirements-networks.txt $(VENV)/.tools
	@for package in torchvision timm; do \
	  $(PY) -c "import importlib.util as u; exit(u.find_spec('$$package') is None)" || \
	    $(PIP) install -qq --no-deps "$$(grep "^$$package==" $<)" || exit 1; \
	done
	@touch $@

# ninja is a program, and has to be found on the PATH.
$(VENV)/.extension: $(VENV)/.tools setup.py pyproject.toml $(SOURCES) $(STALE)
	@echo 'compiling the extension: $(words $(COMPILED)) files, about a minute from scratch (log: $(LOG))'
	@mkdir -p build
	@PATH="$$(cd '$(VENV)/bin' && pwd):$$PATH" \
	  $(PIP) install --verbose --no-build-isolation --no-deps -e . >$(LOG) 2>&1 || { \
	    grep -E -A 5 'error: |not found|bnfused: ' $(LOG) || tail -n 30 $(LOG); \
	    echo 'the build failed; all of its output is in $(LOG)'; exit 1; }
	@sed -n 's/^ *bnfused: /bnfused: /p' $(LOG)
	@touch $@
