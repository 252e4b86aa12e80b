"""The public surface, exactly, and what importing it costs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tvlens


def test_every_public_name_loads_and_no_other_is_public() -> None:
    assert tvlens.__all__ == sorted(tvlens.__all__)
    assert len(tvlens.__all__) <= 25
    assert {*tvlens._HOMES, "Component", "TvlensError"} == set(tvlens.__all__)
    for name in tvlens.__all__:
        assert getattr(tvlens, name) is not None


def test_pages_and_examples_name_only_what_is_public() -> None:
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("examples/**/*.py")]
    asked = {
        (page.name, name)
        for page in pages
        for name in re.findall(r"\btv\.([A-Za-z_]+)", page.read_text("utf-8"))
    }
    assert len(asked) >= 10
    assert {(page, name) for page, name in asked if name not in tvlens.__all__} == set()


def test_import_loads_neither_torch_nor_the_host() -> None:
    code = (
        "import sys, tvlens, tvlens.cli;"
        "heavy = {'torch', 'transformer_lens', 'transformers', 'pandas'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_weights_side_does_not_load_the_host() -> None:
    code = (
        "import sys, tvlens.weights.matching, tvlens.geometry.classify;"
        "heavy = {'transformer_lens', 'transformers', 'peft'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
