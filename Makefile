# `make run` and `make test` set up .venv by themselves; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lab setup outputs lock clean

run: setup
	$(BIN)/python -m fsc147lib.report.workbook

test: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests
	FSC147_OUT=$(CURDIR)/runs/nbval $(BIN)/python -m pytest --nbval-lax --nbval-cell-timeout=900 -p no:cacheprovider notebooks

lab: setup
	$(BIN)/jupyter lab --notebook-dir=notebooks

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# After `make run`: take its executed notebooks as the committed ones.
outputs:
	cp runs/workbook/*.ipynb notebooks/
	cp runs/workbook/results/overview.jpg notebooks/

# Pin the whole environment again, after a change of pyproject.toml.
lock: setup
	(sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//') > requirements.new
	mv requirements.new requirements.lock

clean:
	rm -rf .venv runs
