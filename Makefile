# make demo: train and compare on the built-in teacher.  make test: run the tests.
# Both make a virtual environment in .venv first; PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/python demo/run.py $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .

.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-dev.txt -c constraints.txt
	touch $@
