# Each command sets up .venv by itself; PYTHON chooses the interpreter it is made with.
# `make lab ARGS="--no-browser --port 8899"` passes options on.
PYTHON ?= python3
BIN := .venv/bin
# A process for each core, four at most; files whose tests share fixtures stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: run check test slow lint lab setup outputs lock clean

run: setup
	$(BIN)/python -m fsc147lib.report.runner

# The inner loop: lint, types and the quick tests of every room.
check: lint
	$(PYTEST) -m "not slow and not medium" tests

# The notebooks' results go to an empty folder, not among those of `make run`.
test: lint
	$(PYTEST) -m "not slow" tests
	rm -rf runs/nbval
	FSC147_OUT=$(CURDIR)/runs/nbval $(BIN)/python -c "from fsc147lib.report.workbook import settings; settings()"
	$(MAKE) -j2 nbval-01-02 nbval-03-04

# Notebook 04 shows the runs of 03.
nbval-%: setup
	FSC147_OUT=$(CURDIR)/runs/nbval $(BIN)/python -m pytest --nbval-lax --nbval-cell-timeout=900 -p no:cacheprovider $(foreach n,$(subst -, ,$*),notebooks/$(n)_*.ipynb)

# The tests that train or wait for longer.
slow: setup
	$(PYTEST) -m slow tests

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

lab: setup
	$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# After `make run`: take its executed notebooks as the committed ones.
outputs:
	cp runs/workbook/*.ipynb notebooks/
	cp runs/notebooks/overview.jpg notebooks/

# Pin the whole environment again, after a change of pyproject.toml.
lock: setup
	(sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//') > requirements.new
	mv requirements.new requirements.lock

clean:
	rm -rf .venv runs
