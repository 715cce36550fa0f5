# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Every target sets up its own virtual environment first; PYTHON names the interpreter it is made with.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PARITY ?= ../shared/parity

.PHONY: help demo test lint parity tiny evaluate-tiny format clean
help:            ## what can be made
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

test: $(STAMP)   ## run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(STAMP) ## every parity case under PARITY=folder against our model
	$(BIN)/python -m stableavatar.evaluation.parity $(PARITY)

clean:           ## remove what the targets made
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
