"""A study that is killed and resumed ends with the bytes of one that never was."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_weights_vocabulary import WORDS, word_tokenizer
from tests.tiny_checkpoints import add_noise, copy_with, tiny_llama
from tvlens.errors import StudyError

ROOT = Path(__file__).parent.parent
KILLS = 20
EVERYTHING = """
base: {root}/base
tuned: [{root}/one, {root}/two]
stages: [decompose, attribute, graft, evaluate, sweep, combine, represent]
prompts: {root}/some.jsonl
check_exact: 4
evaluate: {{held: {root}/texts.txt}}
tasks: {root}/tasks.yaml
texts: {root}/texts.txt
scales: "0,1"
grid: "0,1"
draws: 1
"""
TASKS = """
- {{name: first, kind: loss, file: {root}/some.jsonl, domain: one}}
- {{name: second, kind: loss, file: {root}/some.jsonl, domain: two}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with two fine-tunes, a few prompts, texts, tasks, and a plan of all stages."""
    root = tmp_path_factory.mktemp("resuming")
    base = tiny_llama(root / "base", num_hidden_layers=1)
    word_tokenizer(base, WORDS)
    copy_with(base, root / "one", add_noise(scale=0.005))
    copy_with(base, root / "two", add_noise(scale=0.005, seed=5))
    drawn = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in drawn.integers(1, 60, 6)) for _ in range(4)]
    prompts = [{"prompt": text, "answer": " w3", "wrong": " w7"} for text in texts]
    (root / "some.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (root / "texts.txt").write_text("\n\n".join(texts))
    (root / "tasks.yaml").write_text(TASKS.format(root=root))
    (root / "plan.yaml").write_text(EVERYTHING.format(root=root))
    return root


def compared(root: Path) -> list[str]:
    """A comparison with all kinds of files, and with warnings of both stages."""
    words = ["compare", root / "base", root / "one", "--prompts", root / "some.jsonl"]
    return [*map(str, words), "--check-exact", "4", "--position", "--canonical"]


def killed(words: list[str], place: Path, **when: Any) -> tuple[dict[str, Any], list[Any]]:
    """The whole run, and what became of those that were killed (``tests.killed_runs``)."""
    scratch = place / "scratch"
    scratch.mkdir(parents=True)
    asked = json.dumps({"words": words, "place": str(place), **when})
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_runs", asked],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    whole, *turns = map(json.loads, done.stdout.splitlines())
    assert [path.name for path in scratch.iterdir() if "tvlens" in path.name] == []
    return whole, turns


def assert_as_whole(whole: dict[str, Any], turns: list[Any]) -> None:
    """Every resumed study has the files of the whole one, byte by byte, and no others."""
    for turn in turns:
        assert turn["status"] == 0
        assert turn["state"].keys() == whole["state"].keys(), turn["found"]
        for name, content in turn["state"].items():
            assert content == whole["state"][name], (name, turn["found"])


@pytest.mark.slow
def test_a_comparison_that_is_killed_and_resumed_is_the_whole_one(
    root: Path, tmp_path: Path
) -> None:
    """Killed before three changes of its files: the first, one of each stage."""
    whole, turns = killed(compared(root), tmp_path, first=1, stride=12)
    assert [turn["killed"] for turn in turns] == [True] * 3
    assert "attribution.parquet" in whole["state"]
    assert_as_whole(whole, turns)


@pytest.mark.deep
@pytest.mark.parametrize("what", ["compare", "all stages"])
def test_a_kill_at_any_moment_leaves_what_can_be_resumed(
    root: Path, tmp_path: Path, what: str
) -> None:
    words = compared(root) if what == "compare" else ["run", str(root / "plan.yaml")]
    drawn = random.Random(0)
    moments = [drawn.random() for _ in range(KILLS)]
    whole, turns = killed(words, tmp_path, moments=moments)
    print([(turn["killed"], len(turn["found"])) for turn in turns])
    assert len(turns) == KILLS
    assert sum(turn["killed"] for turn in turns) > KILLS / 2
    assert_as_whole(whole, turns)


@pytest.mark.deep
def test_a_kill_before_any_change_of_a_file_leaves_what_can_be_resumed(
    root: Path, tmp_path: Path
) -> None:
    whole, turns = killed(compared(root), tmp_path, stride=1)
    assert len(turns) == len(whole["changes"]) > 30
    assert all(turn["killed"] for turn in turns)
    assert_as_whole(whole, turns)


Stub = Callable[..., Any]


@pytest.fixture
def stubbed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A study whose stages make a fact and a warning each, but for one that is interrupted."""
    from tvlens.study import stages
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    def run(*, interrupted: str = "", resume: bool = False, **options: Any):
        ran = []

        def made(name: str):
            def stage(plan: StudyPlan, pairs: Any, say: Any):
                if name == interrupted:
                    raise KeyboardInterrupt
                ran.append(name)
                facts = {"check_count": 7, "check_nodes": 3, "check_prompts": 2}
                known = facts if name == "attribute" else {}
                yield "one", stages.StageOutput((), known, (f"{name} says {plan.seed}",))

            return stage

        for name in ("decompose", "attribute"):
            monkeypatch.setitem(stages.STAGES, name, made(name))
        asked = {"base": str(root / "base"), "tuned": (str(root / "one"),), **options}
        asked |= {"prompts": str(root / "some.jsonl")}
        try:
            return ran, run_study(StudyPlan(**asked), tmp_path / "s", resume=resume)
        except KeyboardInterrupt:
            return ran, None

    return run


def test_what_a_kept_stage_warned_of_is_still_said(stubbed: Stub) -> None:
    stubbed(interrupted="attribute")
    ran, study = stubbed(resume=True)
    assert ran == ["attribute"]
    assert study.manifest["warnings"] == ["decompose says 0", "attribute says 0"]


@pytest.mark.slow
def test_a_stage_that_runs_again_says_only_its_new_warnings(stubbed: Stub) -> None:
    stubbed()
    _, study = stubbed(stages=("attribute",), seed=1)
    assert study.manifest["warnings"] == ["decompose says 0", "attribute says 1"]


@pytest.mark.slow
def test_a_sample_that_was_planned_by_time_stays_when_a_study_is_resumed(stubbed: Stub) -> None:
    _, study = stubbed()
    planned = (study.folder / "study.yaml").read_bytes()
    assert study.plan.check_exact == 7
    ran, study = stubbed(resume=True)
    assert ran == []
    assert (study.folder / "study.yaml").read_bytes() == planned
    assert "--check-exact 7" in study.manifest["command"]


@pytest.mark.slow
def test_a_stage_of_other_options_is_not_kept(stubbed: Stub) -> None:
    """A study that grew, made again with another seed and killed before its second stage."""
    stubbed()
    ran, _ = stubbed(interrupted="attribute", seed=1)
    assert ran == ["decompose"]
    ran, _ = stubbed(resume=True, seed=1)
    assert ran == ["attribute"]
    with pytest.raises(StudyError, match="other options"):
        stubbed(resume=True)


def test_what_is_left_of_a_study_without_its_manifest_is_no_study(
    stubbed: Stub, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("manifest.json.partial", "load_report.json"):
        (folder / name).write_text("{")
    ran, study = stubbed(resume=True)  # nothing but what a study writes first
    assert ran == ["decompose", "attribute"]
    assert not (folder / "manifest.json.partial").exists()
    (folder / "manifest.json").unlink()
    with pytest.raises(StudyError, match="holds no study"):
        stubbed(resume=True)
    assert study is not None


def test_force_removes_the_manifest_before_all_else() -> None:
    from tvlens.study.store import MANIFEST, STUDY_FILES

    assert STUDY_FILES[0] == MANIFEST


def test_two_fine_tunes_are_checked_with_the_sample_of_the_first() -> None:
    from tvlens.study import stages
    from tvlens.study.plan import StudyPlan

    seen = []

    def stage(plan: StudyPlan, pair: Any, say: Any) -> stages.StageOutput:
        seen.append(plan.check_exact)
        return stages.StageOutput((), {"check_count": 7, "check_nodes": 3, "check_prompts": 2})

    class Named:
        tuned_name = "any"

    plan = StudyPlan(base="b", tuned=("one", "two"))
    list(stages._one_by_one("attribute", stage)(plan, [Named(), Named()], lambda text: None))
    assert seen == [None, 7]
