# The front door: every target makes what it needs and reuses what an earlier call made.
#
#   make demo    train with stock and with fastbn side by side, and measure their throughput
#   make test    test the installed wheel: every promise, with pairs of parameters
#   make test-all    and then the rest: full products of parameters, and what takes long
#   make test-cuda-build   build a wheel with CUDA kernels, without a GPU, and run the suite on it
#   make carry   build the module for a GPU of another machine, as PYTHON and TORCH are there
#   make lint    ruff, mypy and clang-format
#   make bench   measure fastbn against stock in two minutes, with pictures
#   make wheel   build the wheel into dist/
#
# TORCH chooses the torch to install and build against, PYTHON the interpreter of the environment.
# With a torch for CUDA, and nvcc on the machine, all of them build the CUDA kernels too.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

bin := $(VENV)/bin
python := $(abspath $(bin))/python
# Stamps carry the torch requirement in their names: another one starts over.
torch_name := $(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
environment := $(VENV)/environment-$(torch_name)
wheel := $(VENV)/wheel-$(torch_name)
installed := $(VENV)/installed-$(torch_name)

cxx_names := -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
cxx_sources := $(shell find csrc $(cxx_names))
cxx_tests := $(shell find tests $(cxx_names))
wheel_sources := $(cxx_sources) $(shell find fastbn -name '*.py' -o -name '*.pyi') \
  setup.py setup_cuda.py pyproject.toml MANIFEST.in README.md LICENSE

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-cuda-build carry lint bench wheel clean

demo: $(installed)
	$(python) -m benchmarks.demo

bench: $(installed)
	$(python) -m benchmarks --quick --plot bench

# From the folder of the tests, where the installed fastbn is found and not the source tree; two at a
# time, a file to each, as fixtures of a file are made once. Threads of one that wait for each other
# leave the processor to the other.
pytest := cd tests && OMP_WAIT_POLICY=passive $(python) -m pytest -n 2 --dist loadfile

test: $(installed)
	$(python) -m tests.support.cuda_toolkit
	$(pytest)

test-all: test
	$(pytest) --all -m exhaustive

# In an environment of its own, which is kept in the user's cache: its torch has 5 GB.
test-cuda-build:
	$(PYTHON) -m tests.support.cuda_build

# PYTHON=3.12 TORCH=2.11.0, say: a version of either, for compute capability 9.0. Where pyenv keeps
# several interpreters, it is told which.
carry:
	PYENV_VERSION=$(filter 3.%,$(PYTHON)) FASTBN_CARRY_TORCH=$(patsubst torch==%,%,$(TORCH)) \
	  $(if $(filter 3.%,$(PYTHON)),python$(PYTHON),$(PYTHON)) -m tests.support.carry

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(bin)/clang-format --dry-run --Werror $(cxx_sources) $(cxx_tests)

wheel: $(wheel)
	@ls dist/*.whl

clean:
	rm -rf $(VENV) build dist demo bench

$(environment):
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet --upgrade pip
	$(python) -m pip install --quiet '$(TORCH)' 'setuptools>=77' wheel ninja pybind11 numpy
	rm -f $(VENV)/environment-* $(VENV)/wheel-* $(VENV)/installed-*
	touch $@

$(wheel): $(environment) $(wheel_sources)
	rm -rf build/lib* dist
	$(python) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	@# The same module in the source tree, which shadows the installed one for whoever runs Python here.
	$(python) setup.py --quiet build_ext --inplace
	touch $@

$(installed): $(wheel)
	$(python) -m pip install --quiet --force-reinstall --no-deps dist/fastbn-*.whl
	$(python) -m pip install --quiet "$$(ls dist/fastbn-*.whl)[dev]"
	touch $@
