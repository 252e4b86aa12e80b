"""The Python of the documentation runs as it stands, block after block."""

import re
from pathlib import Path

import pytest

import tvlens

DOCS = Path(__file__).parent.parent / "docs"


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.demo
def test_the_tutorials_lines_run(
    demo_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study").symlink_to(demo_study)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("tutorial.md"):
        exec(compile(block, "tutorial.md", "exec"), names)
    joined, frame, divided = (names[name] for name in ("joined", "frame", "divided"))
    assert joined["score"].notna().any()  # type: ignore[index]
    whole = divided.where(component="L5.W_out", geometric_part=None)  # type: ignore[attr-defined]
    sums = frame.groupby("prompt")["score"].sum()  # type: ignore[attr-defined]
    wanted = whole.to_frame().set_index("prompt")["score"]
    assert sums.to_numpy() == pytest.approx(wanted.loc[sums.index].to_numpy(), rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_the_lines_about_concepts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"tv": tvlens}
    for block in blocks("concepts.md"):
        exec(compile(block, "concepts.md", "exec"), names)
    assert len(names["batch"]) > 0  # type: ignore[arg-type]
