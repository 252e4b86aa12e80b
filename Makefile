PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/demo

.PHONY: all demo test test-fast test-deep check format report clean
all: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: all
	$(BIN)/tvlens demo --out $(OUT) --force

test: all
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not deep"

test-fast: all
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not deep and not slow and not demo"

test-deep: all
	$(BIN)/python -m pytest -q -m deep

check: all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv out
