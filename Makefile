# On a fresh machine with Python >= 3.11 and make, run `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# One OpenMP thread: more are very slow when another job shares the cores. Tests download nothing.
# Bytecode is kept, also where the environment says not to: tests start many processes.
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False PYTHONDONTWRITEBYTECODE=
PYTEST := $(QUIET) $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo test test-all lint format docs docs-check clean

demo: .venv/ready
	$(BIN)/mezzotint demo

test: .venv/ready
	$(PYTEST) -m "not slow"

test-all: .venv/ready
	$(PYTEST) --timeout=3600

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(QUIET) $(BIN)/mkdocs build --strict

# Check links, images and commands of README and docs, and the notebooks, as `make test` does too.
docs-check: docs
	$(QUIET) $(BIN)/pytest tests/docs

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Made again when a pin or a dependency changes. The pin of torch keeps pip from downloading CUDA.
.venv/ready: constraints.txt pyproject.toml
	@echo "making .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
