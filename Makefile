# leangpt: `make demo` and `make test` work from a bare clone; `make help` lists the rest.

PYTHON ?= python3
VENV   ?= .venv
# which PyTorch to install: "cpu" from PyTorch's CPU index (small), "cuda" from PyPI; by default what this machine can use
TORCH  ?= $(if $(shell command -v nvidia-smi),cuda,cpu)

BIN       := $(VENV)/bin
CPU_INDEX := https://download.pytorch.org/whl/cpu
# keep ./kernels off sys.path: Hugging Face's package `kernels` has the same name
export PYTHONSAFEPATH = 1
# ninja, for the extension
export PATH := $(CURDIR)/$(BIN):$(PATH)

# a test process for each core, at most 8
PARALLEL := -n auto --maxprocesses 8

.PHONY: help demo test test-full kernels-check gpu-check sanitize build bench lint format types clean

help:            ## list these targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24
	@echo "variables: PYTHON=python3.12, VENV=.venv, TORCH=cpu or cuda, ARCHS=sm_90"

demo: build      ## train a small GPT on this machine in minutes and generate from it
	@$(BIN)/leangpt demo

test: build      ## run the tests
	@$(BIN)/python -m pytest -q $(PARALLEL)

test-full: build ## and the GPU kernels in all configurations, dtypes and orders of threads
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "full or not full"

# GPUs that the kernels are compiled for
ARCHS ?= sm_80,sm_90,sm_100,sm_120

kernels-check: build  ## compile GPU kernels that have changed, compare with kernels/contract.json; no GPU needed
	@$(BIN)/leangpt kernels check --arch $(ARCHS)

gpu-check: build ## on a GPU: run its tests, benchmark decoding, write a page into benchmarks/gpu/
	@reason=$$($(BIN)/python -c "from leangpt.kernels import decode; print(decode.cuda_obstacle() or '')"); \
	if [ -n "$$reason" ]; then echo "leangpt: nothing to check: $$reason"; else \
	    $(BIN)/python -m pytest -q -m "full or not full" tests/gpu tests/cuda && \
	    $(BIN)/python benchmarks/bench_gpu_decode.py --page benchmarks/gpu; fi

ISAS := portable avx2 avx512 avx512_bf16 amx

SANITIZED := address thread train_address train_thread

# two at a time: a compilation is one thread
sanitize:        ## run decode engine and training ops under ASan, UBSan and TSan, on every ISA
	@$(MAKE) -s -j2 $(SANITIZED:%=build/sanitize/%)
	@for program in $(SANITIZED); do for isa in $(ISAS); do echo build/sanitize/$$program $$isa; done; done | \
	    xargs -n 2 -P 2 sh -c 'said=$$(LEANGPT_CPU_ISA=$$1 $$0 2>&1); status=$$?; printf "%s\n" "$$0 $$1" "$$said"; exit $$status'

build/sanitize/address build/sanitize/train_address: SANITIZERS := address,undefined
build/sanitize/thread build/sanitize/train_thread: SANITIZERS := thread
build/sanitize/address build/sanitize/thread: $(wildcard csrc/cpu/*) csrc/batch.cpp csrc/kv_blocks.cpp tests/native/engine_test.cpp
build/sanitize/train_address build/sanitize/train_thread: $(wildcard csrc/train/*) csrc/cpu/isa.cpp $(wildcard csrc/cpu/*.h) \
    tests/native/train_test.cpp
build/sanitize/%: $(wildcard csrc/*.h)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g1 -pthread -ffp-contract=off -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all \
	    -Wall -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unused-function \
	    -I$(if $(findstring train,$@),csrc/train,csrc/cpu) $(filter %.cpp,$^) -o $@

bench: build     ## check every op against float64, then time it (under three minutes)
	@$(BIN)/python benchmarks/bench_ops.py

build: $(VENV)/built  ## compile csrc/, what has changed of it

CPP := $(shell find csrc tests/native tests/emulator tests/cuda -regex '.*\.\(cpp\|h\|cu\|cuh\)')

lint: build types  ## ruff, mypy, clang-format: checks only
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: build    ## rewrite the sources as lint wants them
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CPP)

types:           ## show type checkers the import name: .types/leangpt -> engine, kernels
	@rm -rf .types && mkdir -p .types/leangpt
	@cd .types/leangpt && ln -s ../../engine/* . && ln -s ../../kernels kernels

clean:           ## delete the environment and what was built; data/ and runs/ stay
	rm -rf $(VENV) .types build dist *.egg-info kernels/_*.so

$(VENV)/installed: requirements.lock pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || \
	    { echo "leangpt: there is no '$(PYTHON)': install Python 3.11 to 3.13, or run make with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "leangpt: needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) -V 2>&1): run make with PYTHON=python3.12, say"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "leangpt: $(PYTHON) has no venv module: install it, on Debian with 'apt install python3-venv'"; exit 1; }
	@echo "leangpt: installing the pinned packages into $(VENV) (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test $(TORCH) != cpu || $(BIN)/pip install -q --retries 1 --no-deps --extra-index-url $(CPU_INDEX) \
	    $$(grep '^torch==' requirements.lock)
	@$(BIN)/pip install -q -r requirements.lock
	@$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/built: $(VENV)/installed $(shell find csrc -type f)
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
