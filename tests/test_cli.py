"""The command line: exit statuses, sentences, and that bad input loses nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_gpt2, tiny_llama

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(root / "base")
    return {
        "base": base,
        "tuned": copy_with(base, root / "tuned", add_noise()),
        "other": tiny_gpt2(root / "other"),
        "wide": tiny_llama(root / "wide", hidden_size=64),
        "nan": copy_with(base, root / "nan", _with_nan),
    }


def _with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][2, 5] = float("nan")


@pytest.mark.slow
def test_decompose_writes_the_weights_side_and_loads_no_model(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    status, out, err = run("decompose", folders["base"], folders["tuned"], "--out", tmp_path / "s")
    assert status == 0, err
    made = {p.name for p in (tmp_path / "s").iterdir()}
    assert {"weights.parquet", "tests.parquet", "labels.parquet", "report.html"} <= made
    assert "attribution.parquet" not in made
    assert "report:" in out


@pytest.mark.slow
def test_json_prints_one_object_and_nothing_else(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    status, out, err = run(
        "decompose", folders["base"], folders["tuned"], "--out", tmp_path / "s", "--json"
    )
    assert (status, err) == (0, "")
    assert json.loads(out)["tables"]["labels"] > 0


@pytest.mark.slow
def test_identical_models_are_said_to_be_identical_and_the_run_finishes(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    same = copy_with(folders["base"], tmp_path / "same", lambda tensors: None)
    status, out, err = run("decompose", folders["base"], same, "--out", tmp_path / "s")
    assert status == 0, err
    assert "identical to the base" in out
    report = json.loads((tmp_path / "s" / "load_report.json").read_text())
    assert report["identical"] is True


@pytest.mark.slow
def test_a_model_of_one_layer_is_compared_too(run: Run, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", num_hidden_layers=1)
    tuned = copy_with(base, tmp_path / "tuned", add_noise())
    status, out, err = run("decompose", base, tuned, "--out", tmp_path / "s")
    assert status == 0, err
    assert "over 1 layers" in out


@pytest.mark.parametrize(
    ("tuned", "sentence"),
    [
        ("other", "llama.*gpt2|gpt2.*llama"),
        ("wide", "d_head: 8 in base, 16 in wide"),
        ("nan", "up_proj"),
    ],
)
def test_models_that_cannot_be_compared_give_a_sentence_and_status_2(
    run: Run, folders: dict[str, Path], tmp_path: Path, tuned: str, sentence: str
) -> None:
    import re

    status, _, err = run("decompose", folders["base"], folders[tuned], "--out", tmp_path / "s")
    assert status == 2
    assert re.search(sentence, err)
    assert "Traceback" not in err


def test_a_nan_names_tensor_and_index_and_leaves_a_refused_load_report(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    status, _, err = run("decompose", folders["base"], folders["nan"], "--out", tmp_path / "s")
    assert status == 2
    assert "model.layers.1.mlp.up_proj.weight" in err
    assert "2, 5" in err
    report = json.loads((tmp_path / "s" / "load_report.json").read_text())
    assert "refused" in {entry["status"] for entry in report["tensors"]}


@pytest.mark.parametrize("path", ["/no/such/folder", "demo:bse"])
def test_a_model_that_does_not_exist_gives_a_sentence(
    run: Run, folders: dict[str, Path], tmp_path: Path, path: str
) -> None:
    status, _, err = run("decompose", path, folders["tuned"], "--out", tmp_path / "s")
    assert status == 2
    assert path.removeprefix("demo:") in err
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_an_adapter_is_decomposed_and_its_untouched_tensors_are_said_to_be_so(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    import pandas as pd

    adapter = tiny_adapter(folders["base"], tmp_path / "adapter")
    status, _, err = run("decompose", folders["base"], adapter, "--out", tmp_path / "s")
    assert status == 0, err
    report = json.loads((tmp_path / "s" / "load_report.json").read_text())
    assert "untouched_by_adapter" in {entry["status"] for entry in report["tensors"]}
    weights = pd.read_parquet(tmp_path / "s" / "weights.parquet").query("kind == 'matrix'")
    changed = weights[weights["delta_norm"] > 0]
    assert set(changed["part"]) == {"W_Q", "W_V", "W_out"}
    assert changed["snr"].isna().all()


@pytest.mark.slow
def test_an_output_folder_of_another_pair_is_refused_and_kept(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ("decompose", folders["base"])
    assert run(*words, folders["tuned"], "--out", tmp_path / "s")[0] == 0
    before = (tmp_path / "s" / "weights.parquet").read_bytes()
    again = copy_with(folders["base"], tmp_path / "again", add_noise(seed=7))
    status, _, err = run(*words, again, "--out", tmp_path / "s")
    assert status == 2
    assert "another pair" in err
    assert (tmp_path / "s" / "weights.parquet").read_bytes() == before


@pytest.mark.slow
def test_the_same_plan_gives_the_same_bytes(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        run("decompose", folders["base"], folders["tuned"], "--out", tmp_path / name)
    for table in ("weights", "tests", "labels"):
        one, two = (tmp_path / name / f"{table}.parquet" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), table


@pytest.mark.slow
def test_several_fine_tunes_share_the_tables_under_their_names(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    import pandas as pd

    second = copy_with(folders["base"], tmp_path / "second", add_noise(seed=7))
    words = ("decompose", folders["base"], folders["tuned"], second, "--out", tmp_path / "s")
    assert run(*words)[0] == 0
    weights = pd.read_parquet(tmp_path / "s" / "weights.parquet")
    assert weights.groupby("tuned").size().nunique() == 1
    assert set(weights["tuned"]) == {"tuned", "second"}


@pytest.mark.slow
def test_inspect_reads_headers_and_says_what_would_be_compared(
    run: Run, folders: dict[str, Path]
) -> None:
    status, out, err = run("inspect", folders["base"], folders["tuned"], "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["shape"]["n_kv_heads"] == 2
    assert sum(found["tensors"].values()) > 0


@pytest.mark.slow
def test_inspect_speaks_to_people_too(run: Run, folders: dict[str, Path]) -> None:
    status, out, _ = run("inspect", folders["base"], folders["tuned"])
    assert status == 0
    assert "kB base" in out
    assert "every tensor is compared" in out
    assert "neither model has a tokenizer" in " ".join(out.split())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [('{"prompt": 3}', "line 1: 'prompt' must be text"), ("{", "line 1: not JSON")],
)
def test_bad_prompts_are_found_before_anything_is_made(
    run: Run, folders: dict[str, Path], tmp_path: Path, line: str, sentence: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    words = ("compare", folders["base"], folders["tuned"], "--prompts", prompts)
    status, _, err = run(*words, "--out", tmp_path / "s")
    assert status == 2
    assert sentence in err
    assert not (tmp_path / "s").exists()


def test_a_control_that_is_not_there_is_found_before_anything_is_made(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ("decompose", folders["base"], folders["tuned"], "--control", tmp_path / "none")
    status, _, err = run(*words, "--out", tmp_path / "s")
    assert status == 2
    assert "there is no folder" in err
    assert not (tmp_path / "s").exists()


def test_an_unknown_metric_names_those_there_are(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ("attribute", folders["base"], folders["tuned"], "--metric", "nope")
    status, _, err = run(*words, "--out", tmp_path / "s")
    assert status == 2
    assert "logit_diff, logprob" in err


@pytest.mark.slow
def test_an_interrupt_gives_a_sentence_and_status_130_and_resume_goes_on(
    run: Run, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvlens.study import stages

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    pair = (folders["base"], folders["tuned"])  # without a tokenizer, which covariances need
    words = ("compare", *pair, "--covariances", "off", "--out", tmp_path / "s")
    monkeypatch.setitem(stages.STAGES, "attribute", interrupted)
    status, _, err = run(*words)
    assert status == 130
    assert "interrupted" in err
    before = (tmp_path / "s" / "weights.parquet").read_bytes()
    monkeypatch.setitem(
        stages.STAGES, "attribute", lambda *_: iter([("tuned", stages.StageOutput(()))])
    )
    status, _, err = run(*words, "--resume")
    assert status == 0, err
    assert "decompose: kept" in err
    assert (tmp_path / "s" / "weights.parquet").read_bytes() == before


@pytest.mark.slow
def test_graft_tries_sets_for_real_and_says_what_the_smallest_one_does(
    run: Run, tmp_path: Path
) -> None:
    from importlib.resources import files

    lines = (files("tvlens.demo") / "data" / "prompts_math.jsonl").read_text("utf-8").splitlines()
    some = lines[:8]
    prompts = tmp_path / "some.jsonl"
    prompts.write_text("\n".join(some), "utf-8")
    words = ("graft", "demo:base", "demo:math", "--prompts", prompts, "--metric", "logprob")
    status, out, err = run(*words, "--keep", "0.5", "--out", tmp_path / "s")
    assert status == 0, err
    assert out.count("the smallest set by score that") == 2
    assert "restores 50%" in out
    curves = pd.read_parquet(tmp_path / "s" / "curves.parquet")
    whole = curves[(curves["k"] == curves["of"]) & (curves["ranked_by"] == "score")]
    assert whole["value"].tolist() == pytest.approx([1.0] * len(whole), abs=1e-3)
    sets = pd.read_parquet(tmp_path / "s" / "grafts.parquet")
    assert sets.groupby("curve").size().min() >= 1
    page = (tmp_path / "s" / "report.html").read_text("utf-8")
    assert "The smallest set by score that restores 50%" in page
    status, _, err = run(*words, "--keep", "1.5", "--out", tmp_path / "t")
    assert status == 2
    assert "keep" in err


def test_a_wrong_option_gives_usage_and_status_2(run: Run) -> None:
    status, _, err = run("decompose", "--no-such-option")
    assert status == 2
    assert "no-such-option" in err


def test_the_report_of_a_folder_that_is_no_study_gives_a_sentence(run: Run, tmp_path: Path) -> None:
    status, _, err = run("report", tmp_path)
    assert status == 2
    assert "Traceback" not in err


def test_the_version_is_that_of_the_package(run: Run) -> None:
    from importlib.metadata import version

    import tvlens

    status, out, _ = run("--version")
    assert (status, out) == (0, f"tvlens {version('tvlens')}\n")
    assert tvlens.__version__ == version("tvlens")
