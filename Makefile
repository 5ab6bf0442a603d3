# make setup      the environment in .venv: pinned requirements and r1mega itself
# make test       the environment, then the whole test suite      (ARGS: pytest's, as in ARGS="-k layout")
# make pretrain   the environment, data, then the first example   (ARGS: settings, as in ARGS="--train.num_steps 50")
# make lint       ruff and mypy
# make clean      remove the environment

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --progress-bar off
REQUIREMENTS := $(wildcard requirements/*.txt)
NATIVE := $(wildcard csrc/*.* csrc/cuda/*) tools/build_cuda.py

# Each stamp is made last, so a step that was interrupted is done again.
INSTALLED := $(VENV)/.requirements-installed
BUILT := $(VENV)/.package-built

.PHONY: setup test pretrain lint clean
.DELETE_ON_ERROR:

setup: $(BUILT)

# From scratch each time: pip takes a package whose installation was cut short for an installed one.
$(INSTALLED): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit("r1mega needs Python 3.11 or newer; see make setup PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "setup 1/4: python environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "setup 2/4: torch (the largest download)"
	@$(PIP) --requirement requirements/torch.txt --constraint requirements/lock.txt
	@echo "setup 3/4: other requirements"
	@$(PIP) --requirement requirements/torch.txt --requirement requirements/runtime.txt --requirement requirements/dev.txt --constraint requirements/lock.txt
	@$(PIP) --no-deps --requirement requirements/solver.txt
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("triton"))' || $(PIP) --no-deps --requirement requirements/triton.txt
	@touch $@

$(BUILT): $(INSTALLED) setup.py r1mega/__init__.py $(NATIVE)
	@echo "setup 4/4: r1mega"
	@$(PIP) --no-build-isolation --no-deps --config-settings editable_mode=compat --editable .
	@touch $@

# One thread a process: the suite runs many processes at a time.
test: export OMP_NUM_THREADS ?= 1
test: setup
	@$(BIN)/python -m pytest --quiet $(ARGS)

# Status 2 is a mistake in the settings; the line before names them as flags.
pretrain: setup
	@bash examples/pretrain_r1_moe.sh $(ARGS) || { status=$$?; if [ $$status = 2 ]; then \
		echo 'make pretrain takes settings in ARGS, as in make pretrain ARGS="--train.resume true"' >&2; fi; exit $$status; }

lint: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
