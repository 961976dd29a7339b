# Every target sets itself up: a virtual environment with the pinned requirements, kept between calls.
#   make demo         train, restore and compare on emulated devices (under five minutes on 2 cores)
#   make test         the default tests
#   make test-slow    the tests that take minutes
#   make test-smoke   the short selection that every supported Python must pass
#   make lint         style, formatting and types
#   make clean        remove the environments and what tools left behind
# Another interpreter: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Two workers, each with whole files: compiling is most of the work and uses one core.
WORKERS := -n 2 --dist loadfile
BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-slow test-smoke lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN) scripts/demo.py

test: $(VENV)/.installed-dev
	$(BIN) -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN) -m pytest $(WORKERS) -m slow $(PYTEST_ARGS)

test-smoke: $(VENV)/.installed-dev
	$(BIN) -m pytest $(WORKERS) -m smoke $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m pyright --pythonpath $(BIN)

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) (a minute or two, once)"
	@$(BIN) -c pass 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@$(PIP) -r requirements-dev.txt
	@$(BIN) -m pip check
	@touch $@

clean:
	rm -rf .venv* build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find moe_jax scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
