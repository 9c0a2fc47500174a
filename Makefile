# Two commands do all on a fresh machine with Python 3.11 or 3.12: `make demo` and `make test`.
# PYTHON=... chooses the interpreter of the virtual environment.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO := models/ernie-tiny
PORT := 30000

.PHONY: demo test check test-all test-gpu format clean

# Made once; made anew when what is to be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install one, or PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	# A CUDA build of torch brings the triton it needs: then that one is right, not the pinned one.
	if $(BIN)/python -m pip show -qq triton; then grep -v '^triton==' constraints.txt; \
		else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	test -d $(DEMO) || $(BIN)/python scripts/make_checkpoint.py $(DEMO)
	$(BIN)/python scripts/demo.py --model $(DEMO) --port $(PORT) --max-tokens 48 \
		"Hello!" "What is 457 + 268?" "Name the country with the capital Xelan." \
		"Tell me Norway's main product." "Bye!"

# What waits for other processes, with time-outs, has the machine for itself.
TIMED := tests/parallel tests/server
AT_ONCE := -n auto --maxprocesses 4 --dist worksteal $(TIMED:%=--ignore %)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" $(AT_ONCE)
	$(BIN)/python -m pytest -m "not gpu and not slow" $(TIMED)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_imports.py

# What takes longer than CI may: run it before an issue is resolved.
test-all: $(VENV)/.installed
	HYPOTHESIS_PROFILE=thorough OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" $(AT_ONCE)
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m "not gpu" $(TIMED)

# On a machine with a GPU; uses the environment it is called in.
test-gpu:
	python3 -m pytest -m gpu

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
