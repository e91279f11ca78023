# Two commands for a fresh clone, each doing its own set-up: `make demo` and `make test`.
# Needed beforehand: make, and Python 3.11 to 3.13 as `python3` or under its version (or PYTHON=/path/to/it).

FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do \
	$$each -c '$(FITS)' 2>/dev/null && echo $$each && break; done)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt setup.py
# One thread per operation: several test processes share the machine.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest docs clean

help:
	@echo "make demo   set up, then: explain a plan for a card that is not here, and plan, apply and check one on this CPU"
	@echo "make test   set up, then: ruff, mypy, pytest"
	@echo "make docs   write the generated parts of README.md and docs/ anew"
	@echo "make clean  remove the virtual environment and caches"

# A stamp rather than the interpreter: an environment whose making was interrupted is completed.
$(VENV)/.created:
	@$(or $(PYTHON),false) -c '$(FITS)' || { echo "planner needs Python 3.11 to 3.13; $(or $(PYTHON),none that was found) is not one;" \
	"name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The stamps are newer than what they were made from, so a second run installs nothing.
# pip compiles what it installs, but no checkout.
COMPILE := $(BIN)/python -m compileall -q planner

$(VENV)/.installed: $(SOURCES) | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@$(COMPILE)
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	@echo '$$ planner explain stable-diffusion-xl --gpu "RTX 3060" --batch-size 8'
	@$(BIN)/planner explain stable-diffusion-xl --gpu "RTX 3060" --batch-size 8
	@echo
	@echo '$$ python examples/closed_loop.py'
	@TRANSFORMERS_VERBOSITY=error KINETO_LOG_LEVEL=99 $(BIN)/python examples/closed_loop.py

test: lint types pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

pytest: $(VENV)/.installed-test
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

docs: $(VENV)/.installed-test
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
