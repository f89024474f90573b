# make demo: distil the built-in teacher and compare.  make demo-lora: the same with a LoRA.  make test: run the tests.
# All make a virtual environment in .venv first; PYTHON=python3.12 picks another interpreter.
# make lint: ruff, codespell and mypy.  make docs: the documents as a site with search, in site/.
# make test-oldest: a part of the tests with the oldest versions that requirements.txt allows, in .venv-oldest.

PYTHON ?= python3
BIN := .venv/bin
WORKERS := 3  # of pytest; on two cores one of them often waits

# Every script end to end, its files in diffusers, resuming, uploads, data, evaluation.
OLDEST_TESTS := \
	tests/test_common.py tests/models/test_lora.py tests/models/test_teacher.py \
	tests/scripts/test_train.py::test_output_and_checkpoint_sample_in_the_stock_pipeline \
	"tests/scripts/test_train.py::test_killed_and_resumed_equals_unbroken[lora_sd]" \
	"tests/scripts/test_train.py::test_closing_lines_can_be_run[lora_sdxl]" \
	"tests/scripts/test_train.py::test_public_command_and_what_it_pushes[sdxl]" \
	tests/data/test_pictures.py::test_picture_formats tests/data/test_samples.py::test_what_cannot_be_used_is_counted \
	"tests/scripts/test_precompute.py::test_what_is_stored[sd]" \
	tests/data/test_commands.py::test_a_pipe tests/data/test_positions.py::test_resume_is_exact_with_workers \
	tests/evaluation/test_evaluate.py::test_pictures_are_those_of_the_readmes_code \
	tests/evaluation/test_evaluate.py::test_clip

.PHONY: demo demo-lora test test-oldest lint docs

demo: .venv/installed
	$(BIN)/python demo/run.py $(ARGS)

demo-lora: .venv/installed
	$(BIN)/python demo/run.py --lora $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile $(OLDEST_TESTS) $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d site/.doctrees . site
	@echo "Open site/index.html"

.venv/installed: constraints.txt
.venv-oldest/installed: constraints-oldest.txt
.venv/installed .venv-oldest/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r requirements-dev.txt -c $(filter constraints%,$^)
	touch $@
