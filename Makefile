# The commands of this project. Each creates .venv and installs what is missing first; `make` alone lists them.
PYTHON ?= python3
# Passed on to training, to a benchmark, or to pytest: make train ARGS="--config FILE section.key=value"
ARGS ?=
# Which benchmark `make bench` runs; without it, bench lists them.
NAME ?=

VENV := .venv
BIN := $(VENV)/bin
# vLLM pins a torch and a transformers of its own, so it gets an environment of its own.
TEACHER := .venv-teacher
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# A stamp carries the checksum of what decides the installation: the pins, and the driver for which the torch build was
# chosen (the kernel's own file, because asking nvidia-smi takes seconds on some hosts). Same stamp, nothing to do.
checksum = $(shell cat $(1) /proc/driver/nvidia/version 2>/dev/null | cksum | cut -d' ' -f1)
READY := $(VENV)/.ready-$(call checksum,requirements.txt)
READY_DEV := $(VENV)/.ready-dev-$(call checksum,requirements.txt requirements-dev.txt)
READY_TEACHER := $(TEACHER)/.ready-$(call checksum,requirements-teacher.txt)

# An environment in folder $(1), unless there is a usable one.
define environment
@$(1)/bin/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || { \
    $(PYTHON) -c '$(NEW_ENOUGH)' || { \
        echo "PYTHON=$(PYTHON) is $$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo not there)," \
             "but Python 3.11 or later is needed:" \
             "install one and name it, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }; \
    echo "$(PYTHON) -m venv --clear $(1)"; $(PYTHON) -m venv --clear $(1); }
endef

# One process a GPU, or one on the CPU. All of this is what accelerate does by itself, named so that it does not warn
# about it: precision and compilation come from the config.
PROCESSES := import torch; n = torch.cuda.device_count(); print("--multi_gpu" * (n > 1), "--num_processes", n or 1)
LAUNCH := $(BIN)/accelerate launch --quiet --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: help setup install train test lint bench campaign teacher
.DEFAULT_GOAL := help

help:
	@echo 'make setup      create .venv and install what training and the tests need'
	@echo 'make install    create .venv and install what training needs'
	@echo 'make train      train with config.yaml on every GPU, or on the CPU     ARGS="--config FILE section.key=value"'
	@echo 'make test       run the tests                                          ARGS="tests/data -k NAME"'
	@echo 'make lint       check the style'
	@echo 'make bench      list the benchmarks, or run one                        NAME=... ARGS="--json FILE"'
	@echo 'make campaign   run the long checks that are no part of the tests'
	@echo 'make teacher    create .venv-teacher with vLLM, for the engine that starts it (Linux, NVIDIA driver 580 or later)'
	@echo 'PYTHON=python3.12 chooses the interpreter of a new environment (3.11 or later)'

setup: $(READY_DEV)

install: $(READY)

train: $(READY)
	exec $(LAUNCH) $$($(BIN)/python -c '$(PROCESSES)') multigpu_train.py $(ARGS)

test: $(READY_DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .

bench: $(if $(NAME),$(READY_DEV))
ifeq ($(NAME),)
	@echo 'make bench NAME=... with one of:'
	@grep -l 'result\.parser(' benchmarks/*.py | sed 's,benchmarks/\(.*\)\.py,  \1,'
else
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)
endif

campaign: $(READY_DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m campaign -n 0 --timeout 0 $(ARGS)

teacher: $(READY_TEACHER)

$(READY):
	$(call environment,$(VENV))
	$(BIN)/python deploy/torch_wheel.py
	$(BIN)/python -m pip install --requirement requirements.txt
	@rm -f $(VENV)/.ready-* && touch $@

$(READY_DEV): $(READY)
	$(BIN)/python -m pip install --requirement requirements-dev.txt
	@touch $@

$(READY_TEACHER):
	$(call environment,$(TEACHER))
	$(TEACHER)/bin/python -m pip install --requirement requirements-teacher.txt
	@rm -f $(TEACHER)/.ready-* && touch $@
