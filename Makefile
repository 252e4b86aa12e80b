PYTHON ?= python3
BIN := .venv/bin
BIN39 := .venv-tl39/bin
OUT ?= out/demo

.PHONY: all demo test test-fast test-deep test-tl39 check format report clean
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

# TransformerLens 3.9 in an environment of its own: what touches a hooked model.
HOST_TESTS := $(wildcard tests/test_models_*.py) tests/test_families.py tests/test_weights_layout.py \
	tests/test_weights_memory.py $(addprefix tests/test_attribution_,weights.py exact.py gates.py \
	activations.py nodes.py tokens.py atp.py patching.py parts.py circuits.py layer_integrals.py \
	grafting.py edges.py edge_circuits.py input_lines.py)

test-tl39: .venv-tl39/.installed
	$(BIN39)/python -m pytest -q -n 2 --dist loadfile -m "not deep and not demo" $(HOST_TESTS)

.venv-tl39/.installed: pyproject.toml constraints-tl39.txt
	test -x $(BIN39)/python || $(PYTHON) -m venv .venv-tl39
	$(BIN39)/python -m pip install -q -c constraints-tl39.txt torch
	$(BIN39)/python -m pip install -q -c constraints-tl39.txt -e '.[dev]'
	touch $@

check: all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-tl39 out
