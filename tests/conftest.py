"""Shared fixtures. tvlens is imported inside them: jaxtyping's import hook must come first."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

OTHER_FAMILIES = {"mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt2", "neox"}
WHOLE_STUDIES = {"study", "swept", "part"}
"""Fixtures that run a study from its plan to its report."""

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("tvlens", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("tvlens")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs over families is slow for all but Llama: `make test-fast` takes one of each.

    So is what reads a whole study that is made for it.
    """
    for item in items:
        case = re.search(r"\[(.*)\]", item.name)
        families = {*re.split("[- ]", case[1])} if case else set()
        fixtures = {*getattr(item, "fixturenames", ())}
        if not families.isdisjoint(OTHER_FAMILIES) or not fixtures.isdisjoint(WHOLE_STUDIES):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit status, standard output, standard error."""

    from tvlens import cli

    def run_command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tvlens", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


@pytest.fixture(scope="session")
def demo_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo study: the one CI made, or one made here."""
    if given := os.environ.get("TVLENS_DEMO_STUDY"):
        return Path(given)
    from tvlens.study.demo import run_demo

    folder = tmp_path_factory.mktemp("demo") / "study"
    run_demo(folder)
    return folder
