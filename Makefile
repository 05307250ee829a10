# make demo, test, lint and bench each work in a fresh clone, and later redo only what has changed.
# Everything goes into .venv and build/; the ggml sources into third_party/ggml, downloads into the user's cache.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:

PYTHON ?= python3
PROMPT ?= How do I read a CSV file in Python?
FUZZ_SECONDS ?= 60
ARGS ?=

# One name for the compiler, pip's build and the presets': ccache tells c++ and g++ apart.
ifeq ($(origin CC),default)
CC := cc
endif
ifeq ($(origin CXX),default)
CXX := c++
endif
export PYTHON PROMPT CC CXX
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME

PIP_INSTALL := .venv/bin/python -m pip install -c constraints.txt
SOURCES := $(shell find cpp bindings cmake python third_party/licenses CMakeLists.txt pyproject.toml \
  constraints.txt third_party/ggml.lock tools/fetch_ggml.py -type f ! -name '*.pyc' ! -name '*.so')
CPP_SOURCES = $(shell find cpp bindings tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.c')

.PHONY: help demo test test-cpp test-python test-cuda lint lint-format lint-python lint-boundaries lint-stubs \
  lint-tidy lint-asan lint-tsan lint-fuzz bench stubs format clean

help:
	@echo "make demo    install into .venv, obtain the default base, answer one prompt (PROMPT=...)"
	@echo "make test    C++ and Python tests, parity with llama.cpp and transformers (ARGS=... for pytest)"
	@echo "make test-cuda  the GPU's results against the CPU's, where there is a GPU"
	@echo "make lint    format, types, boundaries, stubs, clang-tidy, sanitizers, fuzzing"
	@echo "make bench   measure against llama.cpp (ARGS=... as in python -m benchmarks --help)"
	@echo "make format  rewrite the sources in the project's format;  make stubs  rewrite _core.pyi"
	@echo "make clean   remove what was built"

demo: .venv/.package
	.venv/bin/modularbase base install smollm2-135m
	.venv/bin/modularbase generate --temperature 0 --max-tokens 128 -p "$$PROMPT"
	.venv/bin/modularbase demo packs

# --- the virtual environment, one stamp a stage ---

.venv/.python: constraints.txt
	tools/apt_packages.sh build
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --upgrade pip scikit-build-core pybind11
	touch $@

# -v shows the compiler's progress; without isolation a rebuild compiles only what changed.
.venv/.package: .venv/.python $(SOURCES)
	$(PIP_INSTALL) --no-build-isolation -v .
	touch $@

.venv/.test: .venv/.package
	$(PIP_INSTALL) --no-build-isolation ".[test]"
	touch $@

.venv/.bench: .venv/.test
	$(PIP_INSTALL) --no-build-isolation ".[bench]"
	touch $@

.venv/.lint: .venv/.package
	$(PIP_INSTALL) --no-build-isolation ".[lint]"
	touch $@

.venv/.llama-cpp-python: .venv/.test benchmarks/peers/wheel.py
	$(PIP_INSTALL) "$$(.venv/bin/python -m benchmarks.peers.wheel)"
	touch $@

# --- test ---

test: test-cpp test-python

test-cpp: .venv/.python
	tools/apt_packages.sh build test
	cmake --preset release
	cmake --build --preset release
	ctest --preset release

test-python: .venv/.test .venv/.llama-cpp-python
	.venv/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# Not part of `test`: it needs an NVIDIA GPU and nvcc, and leaves a package that computes there.
test-cuda: .venv/.test
	$(PIP_INSTALL) --no-build-isolation -C cmake.define.GGML_CUDA=ON -v .
	.venv/bin/python -m pytest tests/cuda $(ARGS)

# --- lint ---

lint: lint-format lint-python lint-boundaries lint-stubs lint-tidy lint-asan lint-tsan lint-fuzz

lint-format: .venv/.lint
	clang-format --dry-run --Werror $(CPP_SOURCES)
	gersemi --check CMakeLists.txt cmake cpp bindings tests
	ruff check .
	ruff format --check .

lint-python: .venv/.lint
	mypy

lint-boundaries: .venv/.lint
	tools/check_layers.py
	tools/check_file_length.py
	lint-imports

lint-stubs: .venv/.lint
	.venv/bin/python tools/check_stubs.py

lint-tidy: .venv/.lint
	tools/apt_packages.sh build test lint
	cmake --preset dev -DMODULARBASE_BUILD_PYTHON=ON
	find cpp bindings -name '*.cpp' -print0 | xargs -0 -n 2 -P "$$(nproc)" clang-tidy -quiet -p build/dev

lint-asan: .venv/.python
	tools/apt_packages.sh build test
	cmake --preset asan
	cmake --build --preset asan
	ctest --preset asan

lint-tsan: .venv/.python
	tools/apt_packages.sh build test
	cmake --preset tsan
	cmake --build --preset tsan
	ctest --preset tsan

lint-fuzz: .venv/.python
	tools/apt_packages.sh build lint
	tests/fuzz/run.sh $(FUZZ_SECONDS)

# --- bench, and what rewrites sources ---

bench: .venv/.bench
	.venv/bin/python -m benchmarks $(ARGS)

stubs: .venv/.lint
	.venv/bin/python tools/check_stubs.py --update

format: .venv/.lint
	clang-format -i $(CPP_SOURCES)
	gersemi -i CMakeLists.txt cmake cpp bindings tests
	ruff check --fix .
	ruff format .

clean:
	rm -rf build dist .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
