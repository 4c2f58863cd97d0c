# make demo   trains a character model on real text and samples from it
# make test   C++ tests, then the Python tests
# make cuda   compiles the CUDA path for every GPU and checks what nvcc made of it; needs nvcc, no GPU
# make bench  the benchmarks
# make lint   formatting, types, spelling, dependencies between the parts, stubs, warnings as errors
# make neon   the C++ tests for AArch64 under an emulator      make sanitize  ... under ASan+UBSan and under TSan
# make counts counts the instructions of three calls and compares with the record (make counts WRITE=1 records)
# make mutants  breaks the cell maths on purpose; the tests must notice       make clean
#
# Each target first makes what it needs: a virtual environment in .venv and fastrnn built and installed into it. Nothing
# is installed outside this checkout, except that `make neon` gets its compiler and `make counts` valgrind from Debian
# when run as root. The CUDA path is built where there are nvcc and a GPU; its twin for an emulated GPU, on which it is
# tested everywhere, by `make test` and `make lint`.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# cmake, ninja, ruff, ... of the virtual environment first.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The compiled files stay here between calls, so that a change recompiles only what it touches. Under CI everything is
# built once, with warnings as errors; elsewhere that is kept apart so that `make test` and `make lint` don't undo each
# other's work.
BUILD := build/$(if $(CI),werror,release)
WERROR := $(if $(CI),ON,OFF)

# Under CI the largest of the three installations, once.
CLI := $(VENV)/$(if $(CI),.dev,.cli)
TEST := $(VENV)/$(if $(CI),.dev,.test)

SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE $(wildcard cmake/*.cmake cmake/*/CMakeLists.txt) \
           $(shell find csrc python -not -path '*/__pycache__*' -not -path '*/.*')
CPP_TESTS := $(wildcard tests/cpp/* tests/cpp/cuda/*)

# nvcc takes minutes: for nothing without a GPU, and under CI only once, in `make cuda`.
CUDA := $(if $(CI),OFF,$(if $(wildcard /dev/nvidiactl /dev/dxg),AUTO,OFF))
NVCC := $(shell PATH="$$PATH:$${CUDA_PATH:-/usr/local/cuda}/bin:$${CUDA_HOME:-/usr/local/cuda}/bin" command -v $${CUDACXX:-nvcc})

.PHONY: demo test bench lint cuda neon sanitize mutants counts examples clean check-machine check-cuda
.NOTPARALLEL:
.DELETE_ON_ERROR:

# $(call install,<extra>,<build folder>,<cmake options>): build what has changed and install it with the extra's
# packages. The stamps of other installations go: what they stood for is no longer there.
install = echo "== building fastrnn and installing it into $(VENV) (the first time: a few minutes)" && \
          rm -f $(VENV)/.cli $(VENV)/.test $(VENV)/.dev $(VENV)/.cuda && \
          $(PY) -m pip install -q --no-build-isolation --config-settings=build-dir=$(2) \
            $(foreach option,$(3),--config-settings=cmake.define.$(option)) ".[$(1)]"

demo: $(CLI)
	mkdir -p demo
	fastrnn train --out demo/model.safetensors
	fastrnn sample demo/model.safetensors --prompt "The " --length 300

test: $(TEST)
	ctest --test-dir $(BUILD) -j2 --output-on-failure --no-tests=error
	$(PY) -m pytest

bench: $(CLI)
	$(PY) -m benchmarks

lint: $(VENV)/.dev
	ruff check
	ruff format --check
	mypy
	clang-format --dry-run -Werror $$(find csrc tests/cpp -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')
	codespell
	$(PY) tools/check_dependencies.py
	$(PY) tools/check_stubs.py

cuda:
	@if [ -n "$(NVCC)" ]; then $(MAKE) --no-print-directory check-cuda; else \
	  echo "make cuda: there is no nvcc, so the CUDA path is not compiled"; $(if $(CI),,exit 1;) \
	fi

check-cuda: $(VENV)/.cuda
	$(PY) tools/cuda_gates.py
	$(PY) -m pytest tests/test_cuda_module.py

neon: $(VENV)/.tools
	@if ! command -v aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get -q update && DEBIAN_FRONTEND=noninteractive \
	      apt-get -q install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user; \
	  else \
	    echo "make neon needs a cross compiler and an emulator: sudo apt install g++-aarch64-linux-gnu qemu-user" >&2; \
	    exit 1; \
	  fi; \
	fi
	cmake --workflow --preset neon-qemu

sanitize: $(VENV)/.tools
	cmake --workflow --preset asan-ubsan
	@# TSan of older GCCs dies on kernels that randomise addresses more than it expects; setarch -R turns that off.
	$$(setarch -R true 2>/dev/null && echo setarch -R) cmake --workflow --preset tsan

mutants: $(TEST)
	$(PY) tools/mutants.py

counts: $(CLI)
	@if ! command -v valgrind >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends valgrind; \
	  else \
	    echo "make counts needs valgrind: sudo apt install valgrind" >&2; exit 1; \
	  fi; \
	fi
	$(PY) tools/instruction_counts.py $(if $(WRITE),--write)

examples: $(CLI)
	$(PY) examples/sentiment.py

clean:
	rm -rf $(VENV) build dist

# Says in one line what the machine lacks, before pip says it in a hundred.
check-machine:
	@command -v $(PYTHON) >/dev/null || { echo "fastrnn needs Python 3.10 or newer: sudo apt install python3 python3-venv python3-dev" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastrnn needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@missing=; \
	command -v $${CXX:-c++} >/dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing="$$missing python3-dev"; \
	[ -z "$$missing" ] || { echo "fastrnn is compiled here and lacks something for it: sudo apt install$$missing" >&2; exit 1; }

# The virtual environment with the tools to build: the requires line of pyproject.toml, cmake and ninja.
$(VENV)/.tools: pyproject.toml | check-machine
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q --upgrade pip $$(sed -n 's/^requires = \["\(.*\)"\]$$/\1/p' pyproject.toml | sed 's/", "/ /g') cmake ninja
	@touch $@

$(VENV)/.cli: $(VENV)/.tools $(SOURCES)
	@$(call install,cli,$(BUILD),FASTRNN_TESTS=OFF FASTRNN_WERROR=$(WERROR) FASTRNN_CUDA=$(CUDA) FASTRNN_CUDA_EMULATED=OFF)
	@touch $@

$(VENV)/.test: $(VENV)/.tools $(SOURCES) $(CPP_TESTS)
	@$(call install,test,$(BUILD),FASTRNN_TESTS=ON FASTRNN_WERROR=$(WERROR) FASTRNN_CUDA=$(CUDA) FASTRNN_CUDA_EMULATED=ON)
	@touch $@ $(VENV)/.cli

$(VENV)/.dev: $(VENV)/.tools $(SOURCES) $(CPP_TESTS)
	@$(call install,dev,build/werror,FASTRNN_TESTS=ON FASTRNN_WERROR=ON FASTRNN_CUDA=OFF FASTRNN_CUDA_EMULATED=ON)
	@touch $@

$(VENV)/.cuda: $(VENV)/.tools $(SOURCES) $(CPP_TESTS)
	@$(call install,dev,build/werror,FASTRNN_TESTS=ON FASTRNN_WERROR=ON FASTRNN_CUDA=ON FASTRNN_CUDA_EMULATED=ON)
	@touch $@ $(VENV)/.dev
