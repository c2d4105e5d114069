# `make bench` and `make test` work on a fresh clone: they set up .venv first if it is missing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/bench
JOBS   ?= auto
CASES  ?= 10000
SEED   ?= 0
WHEELS ?= dist
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --constraint requirements-dev.txt
FORMATTED := $(SOURCES) $(wildcard tests/emulator/*.cpp tests/emulator/*.h tests/cpu/*.cpp tests/*.h)

.PHONY: help setup bench test test-all docs fuzz gpu wheel wheel-check lint format clean

help:
	@echo "make bench    memory and speed of a training step, compared with torchvision's (OUT=$(OUT))"
	@echo "make test     the whole test suite; Triton kernels in Triton's interpreter, CUDA kernels in an emulator"
	@echo "make test-all the same with every combination of parameters: takes more than twice as long"
	@echo "make docs     the documentation as a site in build/docs; a broken link is an error"
	@echo "make fuzz     compare fused with eager on random networks, changes and calls (CASES=$(CASES))"
	@echo "make gpu      tests and measurements on this machine's GPU, with the system's python3 (OUT=$(OUT))"
	@echo "make wheel    sdist and wheel for a release, checked in a fresh environment (WHEELS=$(WHEELS))"
	@echo "make wheel-check  the same with several versions of Python and PyTorch: slow, downloads gigabytes"
	@echo "make lint     ruff, mypy and clang-format"
	@echo "make format   format the sources with ruff and clang-format"
	@echo "make clean    remove build products"

setup: $(VENV)/installed

$(VENV)/requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-dev.txt
	touch $@

# An editable install compiles the libraries into dense_ext/.
$(VENV)/installed: $(VENV)/requirements pyproject.toml setup.py csrc/rules.ninja $(SOURCES)
	$(PIP) --no-build-isolation --no-deps -v -e .
	touch $@

# What `make bench` takes of the development set, in the same versions, and the CPU library that this machine
# loads: half the time of all of it.
$(VENV)/bench: export DENSE_EXT_CPU = native
$(VENV)/bench: requirements-dev.txt pyproject.toml setup.py csrc/rules.ninja $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools ninja torch
	$(PIP) --no-build-isolation -v -e '.[bench]'
	touch $@

bench: $(VENV)/bench
	$(BIN)/dense-ext bench --out $(OUT) --overwrite

# One process per core, each with one thread; for the small tensors of tests, two take half as much time again.
test test-all fuzz: export OMP_NUM_THREADS = 1
# Tests of threads start more than there are cores: those that wait sleep.
test test-all fuzz: export OMP_WAIT_POLICY = passive

PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-all: PYTEST += --exhaustive

test test-all: setup
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/primitives tests/gpu tests/triton
	$(PYTEST) --device emulator tests/cuda tests/gpu tests/primitives

docs: setup
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/docs

# Prints a line for each hundred cases.
fuzz: setup
	HYPOTHESIS_PROFILE=fuzz CASES=$(CASES) SEED=$(SEED) \
		$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -v tests/test_campaign.py

# Installs nothing; the machine must have PyTorch, Triton, torchvision and pytest.
gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT)

# A release has code for every GPU; without nvcc, DENSE_EXT_CUDA=0 leaves CUDA out.
wheel wheel-check: export DENSE_EXT_BUILD = 1
wheel wheel-check: export DENSE_EXT_CUDA ?= 1

wheel: setup
	$(BIN)/python tests/wheel.py --out $(WHEELS) --torch torch \
		--python $$($(BIN)/python -c "import sys; print('{}.{}'.format(*sys.version_info))")

# One build has to serve every Python and PyTorch.
wheel-check: setup
	$(BIN)/python tests/wheel.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --style=file:csrc/.clang-format --dry-run --Werror $(FORMATTED)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format --style=file:csrc/.clang-format -i $(FORMATTED)

clean:
	rm -rf build dist *.egg-info dense_ext/*.so
