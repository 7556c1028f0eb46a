# make demo | make test: on a fresh machine with python3 and its venv module; for the kernels g++ and Python's headers (Debian, Ubuntu:
# apt-get install python3-venv g++ python3-dev), nvcc for those on a GPU. Everything lands in $(VENV).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
BENCH_ARGS ?=
GPU_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc zsq_fast build_backend -type f -not -name '*.pyc' -not -name '*.so' -not -name '_build_info.json') \
           pyproject.toml setup.py CMakeLists.txt
CXX_SOURCES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')
# A missing kernel fails the tests; CUDA kernels are expected where nvcc fits the installed torch.
EXPECTED = cpu$(if $(findstring cuda,$(shell $(BIN)/python build_backend/zsq_probe.py)),$(comma)cuda)
comma := ,

.PHONY: demo test lint bench gpu-check env clean FORCE
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/zsq-fast demo $(DEMO_ARGS)

test: $(VENV)/.installed
	ZSQ_REQUIRE_KERNELS=$(EXPECTED) $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

env: $(VENV)/.installed
	$(BIN)/zsq-fast env

# torch comes first and stays: `pip install .` finds it and builds the kernels against it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	touch $@

# The list of the sources, rewritten when it changes: a file that is gone makes no target older, but must go from the installation too.
$(VENV)/.sources: FORCE | $(VENV)/.torch
	@echo $(sort $(SOURCES)) | cmp -s - $@ || echo $(sort $(SOURCES)) > $@
FORCE:

$(VENV)/.installed: $(VENV)/.torch $(VENV)/.sources $(SOURCES)
	$(PIP) install --quiet '.[demo,test]'
	$(BIN)/zsq-fast env
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.installed
	$(PIP) install --quiet '.[dev]'
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(PIP) install --quiet '.[bench]'
	$(BIN)/pytest -q --import-mode=importlib benchmarks/test_kernels.py $(BENCH_ARGS)

# What it needs and does: benchmarks/gpu_check.py. GPU_ARGS="--device cpu" rehearses it without a GPU.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(GPU_ARGS)

clean:
	rm -rf build dist .gpu zsq_fast.egg-info zsq_fast/_C.*.so zsq_fast/_build_info.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
