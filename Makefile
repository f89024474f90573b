# make demo: distil the built-in teacher and compare.  make demo-lora: the same with a LoRA.  make test: run the tests.
# All make a virtual environment in .venv first; PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-lora test lint

demo: .venv/installed
	$(BIN)/python demo/run.py $(ARGS)

demo-lora: .venv/installed
	$(BIN)/python demo/run.py --lora $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .

.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-dev.txt -c constraints.txt
	touch $@
