"""The Python of the pages about extending tvlens runs as it stands; so does the example."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_page_on_extending_runs_and_says_what_is_true() -> None:
    names: dict[str, object] = {"__name__": "page"}
    parts = blocks(ROOT / "docs" / "extending.md")
    assert len(parts) == 3
    for part in parts:
        exec(compile(part, "extending.md", "exec"), names)
    found = names["found"]
    labels = found.labels.to_frame()  # type: ignore[attr-defined]
    assert "concentrated" in set(labels["label"])
    assert set(labels["decided_by"]) == {"page:by_concentration"}
    values = found.measures.to_frame()["value"]  # type: ignore[attr-defined]
    assert values.between(0.1, 1).all()


@pytest.mark.slow
def test_the_example_prints_its_table_and_serves_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    import pandas as pd

    from tvlens import cli

    monkeypatch.chdir(ROOT / "examples")
    spec = importlib.util.spec_from_file_location("own_labels", ROOT / "examples/own_labels.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    assert "concentrated" in capsys.readouterr().out
    words = ["tvlens", "decompose", "demo:base", "demo:med", "--out", str(tmp_path / "study")]
    words += ["--measure", "own_labels:row_concentration"]
    words += ["--classifier", "own_labels:by_concentration", "--quiet"]
    monkeypatch.setattr("sys.argv", words)
    before = list(sys.path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert sys.path == before
    sys.modules.pop("own_labels", None)
    labels = pd.read_parquet(tmp_path / "study" / "labels.parquet")
    assert set(labels["decided_by"]) == {"own_labels:by_concentration"}
    said = labels.loc[labels["label"] == "concentrated", "label_reason"]
    assert said.str.endswith("of the energy in a tenth of the rows").all()
