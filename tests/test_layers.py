"""The rings of the architecture: a module imports from its own ring or one further in."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tvlens"
RINGS = {
    "errors": 0,
    "callables": 0,
    "components": 0,
    "selection": 0,
    "tables": 0,
    "threads": 0,
    "memory": 0,
    "files": 0,
    "demo": 0,
    "weights": 1,
    "geometry": 2,
    "models": 2,
    "compose": 3,
    "attribution": 3,
    "evaluation": 4,
    "reporting": 4,
    "study": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 7,
}
BLIND = {("geometry", "models"), ("models", "geometry")}
HOST = {"transformer_lens", "transformers", "peft"}
GGUF_NAMES = PACKAGE / "weights" / "sources" / "gguf_names.py"
"""Asks transformers what GGUF files call their tensors, and loads no model."""


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    """Top-level tvlens names that the module at ``path`` imports, anywhere in it."""
    found = set()
    package = ("tvlens", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = (*base, *(node.module or "").split(".")) if node.module else base
            names = [full] if node.module else [(*full, alias.name) for alias in node.names]
            found |= {name[1] for name in names if len(name) > 1}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tvlens."):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_from_its_own_ring_or_one_further_in(path: Path) -> None:
    own = _top(path)
    assert own in RINGS, f"{own} has no ring: add it to the table with a reason"
    for other in _imported(path):
        assert RINGS[other] <= RINGS[own], f"{path.name} (ring of {own}) imports {other}"
        assert (own, other) not in BLIND, f"{own} must be blind to {other}"


@pytest.mark.slow
@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_models_names_the_host(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add((node.module or "").split(".")[0])
    allowed = {"transformers"} if path == GGUF_NAMES else set()
    assert _top(path) == "models" or not imported & HOST - allowed


def test_no_module_is_named_for_nothing_and_none_names_a_device() -> None:
    for path in _modules():
        assert path.stem not in {"utils", "helpers", "common", "misc", "core", "base"}
        assert '"cuda' not in path.read_text("utf-8")
