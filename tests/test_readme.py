"""The README's Python lines run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
@pytest.mark.demo
def test_the_notebook_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    asked = 'pair.compare(tv.prompts("demo:med"))'
    assert asked in block
    block = block.replace(asked, f"{asked[:-1]}, check_seconds=2)")  # of 60, which it would use up
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    study, tau = names["study"], names["tau"]
    assert len(study.attribution) > 0  # type: ignore[attr-defined]
    assert (tau + tau - tau).norm() == pytest.approx(tau.norm(), rel=1e-6)  # type: ignore[attr-defined]


def test_every_file_that_the_readme_names_is_there() -> None:
    text = README.read_text("utf-8")
    for name in re.findall(r"\]\(((?:docs|tvlens)/[^)]+)\)", text):
        assert (README.parent / name).is_file(), name
