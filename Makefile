# SPDX-License-Identifier: Apache-2.0
# Every target first makes .venv, or brings it up to date with the sources that the build depends on.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

BIN := .venv/bin
READY := .venv/.ready
# Folders too: their time changes when a file is added or removed.
BUILT_FROM := $(shell find csrc) setup.py CMakeLists.txt pyproject.toml
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test lint bench format clean FORCE

help:
	@echo "make demo    segment a clip and print scores and speed"
	@echo "make test    the whole test suite"
	@echo "make lint    ruff, mypy, clang-format: check only"
	@echo "make format  ruff and clang-format: rewrite"
	@echo "make bench   the regression set and the memory_read benchmark"
	@echo "make setup   only the virtual environment .venv (done by each of the above)"
	@echo "make clean   remove .venv and everything built"

setup: $(READY)

demo: $(READY)
	$(BIN)/vosops demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(READY)
	$(BIN)/python -m pytest benchmarks/test_regression.py --benchmark-enable
	$(BIN)/python -m benchmarks.run memory_read --all

clean:
	rm -rf .venv build vosops/_lib vosops/_C*.so *.egg-info

# A compiler installed after the first set-up is noticed: nothing was compiled, and now it could be.
ifneq ($(VOSOPS_BUILD_CPU),0)
ifeq ($(wildcard vosops/_lib/libvosops_cpu.so),)
ifneq ($(shell command -v "$${CXX:-g++}" || command -v clang++),)
$(READY): FORCE
endif
endif
endif

$(READY): $(BUILT_FROM) .ci/venv
	.ci/venv
	@touch $@
