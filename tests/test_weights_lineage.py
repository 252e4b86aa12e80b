"""Is this the parent, and how does a way over a parent divide into its steps?"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.test_weights_vocabulary import WORDS, resized, word_tokenizer
from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.errors import AdapterError, CheckpointError, IncomparableModelsError

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("lineage") / "base")
    word_tokenizer(folder, WORDS)
    return folder


def _reinitialised(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(9)
    for name, tensor in sorted(tensors.items()):
        if tensor.dim() == 2:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * tensor.std()


def _permuted(tensors: dict[str, Tensor]) -> None:
    for layer in range(2):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(layer))
        block = f"model.layers.{layer}.mlp."
        for part in ("up_proj", "gate_proj"):
            tensors[f"{block}{part}.weight"] = tensors[f"{block}{part}.weight"][order]
        tensors[f"{block}down_proj.weight"] = tensors[f"{block}down_proj.weight"][:, order]


# --- likeness -----------------------------------------------------------------------------------


def test_likeness_is_what_a_slow_loop_over_the_sampled_rows_gives(
    base: Path, tmp_path: Path
) -> None:
    from tvlens.weights.lineage import likeness
    from tvlens.weights.matching import load_pair

    tuned = copy_with(base, tmp_path / "tuned", add_noise(scale=0.1))
    found = likeness(load_pair(base, tuned))
    sampled = {32: range(32), 16: range(16), 48: range(8, 40), 64: [*range(12, 28), *range(36, 52)]}
    first, second = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    cosines: dict[str, list[float]] = {}
    squares, rows = [0.0, 0.0], 0
    for name, tensor in first.items():
        if tensor.dim() != 2:
            continue
        chosen = list(sampled[len(tensor)])
        a, b = tensor[chosen].double(), second[name][chosen].double()
        cosine = float((a * b).sum() / a.norm() / b.norm())
        cosines.setdefault(name.split(".")[-2], []).append(cosine)
        squares[0] += float((b - a).square().sum())
        squares[1] += float(a.square().sum())
        rows += len(chosen)
    assert found.rows == rows
    assert found.relative_delta == pytest.approx(math.sqrt(squares[0] / squares[1]))
    assert found.distance == pytest.approx(math.sqrt(squares[0]))
    assert found.cosine_by_part["W_gate"] == pytest.approx(sum(cosines["gate_proj"]) / 2)
    assert found.cosine_by_part["W_U"] == pytest.approx(cosines["lm_head"][0])
    every = sorted(cosine for part in cosines.values() for cosine in part)
    assert found.cosine == pytest.approx((every[len(every) // 2] + every[~(len(every) // 2)]) / 2)
    assert found.verdict == "plausible"
    assert found.warning == ""


def test_a_shipped_fine_tune_is_a_child_of_its_base() -> None:
    from tvlens.weights.lineage import likeness
    from tvlens.weights.matching import load_pair

    found = likeness(load_pair("demo:base", "demo:med", scan=False))
    assert found.verdict == "plausible"
    assert found.cosine == pytest.approx(0.984, abs=0.002)
    assert found.relative_delta == pytest.approx(0.182, abs=0.005)


def test_a_reinitialised_model_is_no_child_and_loading_says_so(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.lineage import likeness
    from tvlens.weights.matching import load_pair

    pair = load_pair(base, copy_with(base, tmp_path / "other", _reinitialised))
    found = likeness(pair)
    assert found.verdict == "implausible"
    assert abs(found.cosine) < 4 * found.chance
    assert found.relative_delta == pytest.approx(2**0.5, rel=0.05)
    warned = pair.load_report.warnings
    assert any("base does not look like the parent of other" in w for w in warned)


def test_permuted_neurons_are_a_likeness_in_part(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.lineage import likeness
    from tvlens.weights.matching import load_pair

    pair = load_pair(base, copy_with(base, tmp_path / "permuted", _permuted))
    found = likeness(pair)
    assert (found.verdict, found.unlike) == ("in part", ["W_gate", "W_in", "W_out"])
    assert any("only in part: cosines of W_gate" in w for w in pair.load_report.warnings)


def test_a_permuted_vocabulary_is_compared_by_token(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.lineage import likeness
    from tvlens.weights.matching import load_pair

    order = torch.randperm(60, generator=torch.Generator().manual_seed(2)).tolist()
    tuned = resized(base, tmp_path / "tuned", [*order, 60, 61, 62, 63])
    word_tokenizer(tuned, [WORDS[i] for i in order])
    found = likeness(load_pair(base, tuned))
    assert found.cosine_by_part["W_E"] == pytest.approx(1)
    assert found.equal_fraction == 1


def test_an_adapter_has_no_weights_to_compare(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.lineage import likeness
    from tvlens.weights.matching import load_pair

    with pytest.raises(AdapterError, match="holds no weights of its base"):
        likeness(load_pair(base, tiny_adapter(base, tmp_path / "adapter")))


def test_a_nan_among_the_sampled_rows_is_named(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.lineage import likeness
    from tvlens.weights.matching import load_pair

    bad = copy_with(base, tmp_path / "bad", lambda t: t[UP.format(0)][30, 3].fill_(math.nan))
    with pytest.raises(CheckpointError, match=r"bad: .*up_proj\.weight\[30, 3\]"):
        likeness(load_pair(base, bad, scan=False))


# --- ranking ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_base_is_told_from_siblings_and_strangers() -> None:
    from tvlens.study.inspection import parent_ranking

    found = parent_ranking("demo:med", ["demo:math", "demo:ctl", "demo:base", "demo:math"])
    ranked = [row["candidate"] for row in found["candidates"]]
    assert ranked == ["demo:base", "demo:ctl", "demo:math"]
    assert found["likeliest"] == "demo:base"


@pytest.mark.slow
def test_a_chain_ranks_the_nearest_ancestor_first(base: Path, tmp_path: Path) -> None:
    from tvlens.study.inspection import parent_ranking

    parent = copy_with(base, tmp_path / "parent", add_noise(seed=1, scale=0.04))
    tuned = copy_with(parent, tmp_path / "tuned", add_noise(seed=2, scale=0.04))
    stranger = copy_with(base, tmp_path / "stranger", _reinitialised)
    other = tiny_llama(tmp_path / "wide", hidden_size=64)
    found = parent_ranking(str(tuned), [str(f) for f in (stranger, base, other, parent)])
    rows = found["candidates"]
    assert [Path(row["candidate"]).name for row in rows] == ["parent", "base", "stranger", "wide"]
    assert [row["verdict"] for row in rows[2:]] == ["implausible", "refused"]
    assert found["likeliest"] == str(parent)
    assert "d_head: 16 in wide, 8 in tuned" in rows[3]["reason"]


@pytest.mark.slow
def test_siblings_that_learned_the_same_cannot_be_told_from_a_chain(
    base: Path, tmp_path: Path
) -> None:
    """Two siblings with half of their change in common lie as far apart as from the base."""
    from tvlens.study.inspection import parent_ranking

    common = copy_with(base, tmp_path / "common", add_noise(seed=1, scale=0.02))
    tuned = copy_with(common, tmp_path / "tuned", add_noise(seed=2, scale=0.02))
    sibling = copy_with(common, tmp_path / "sibling", add_noise(seed=3, scale=0.02))
    found = parent_ranking(str(tuned), [str(base), str(sibling)])
    assert found["likeliest"] is None
    assert "cannot be told apart" in found["sentence"]
    found = parent_ranking(str(tuned), [str(base), str(sibling), str(common)])
    assert found["likeliest"] == str(common)


def test_nobodys_child_has_no_likeliest_parent(base: Path, tmp_path: Path) -> None:
    from tvlens.study.inspection import parent_ranking

    orphan = copy_with(base, tmp_path / "orphan", _reinitialised)
    found = parent_ranking(str(orphan), [str(base)])
    assert found["likeliest"] is None
    assert found["sentence"].startswith("None of the candidates looks like the parent")


@pytest.mark.parametrize(
    ("nearest", "other", "between", "apart"),
    [
        (1.0, 2**0.5, 1.0, True),  # a right angle at the nearest
        (1.0, 1.0, 1.0, False),  # equilateral
        (1.0, 1.02, 0.2, False),  # the other took a very short step
        (0.0, 1.0, 1.0, True),  # a copy
        (1.0, 1.0, 0.0, False),  # two copies of one candidate
    ],
)
def test_angles_decide(nearest: float, other: float, between: float, apart: bool) -> None:
    from tvlens.weights.lineage import told_apart

    assert told_apart(nearest, other, between) is apart


# --- steps --------------------------------------------------------------------------------------


def _model_row(table) -> dict[str, float]:
    return table.where(level="model").to_frame().iloc[0].to_dict()


def _of_kinds(vector, kinds: set[str]):
    return vector.select(lambda component: component.kind in kinds)


def _flat(vector) -> Tensor:
    return torch.cat([delta.dense().double().flatten() for delta in vector.values()])


def test_steps_have_the_lengths_cosine_and_shares_of_the_tuning_vectors(
    base: Path, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.steps import detour_warning, lineage_table
    from tvlens.weights.vector import tuning_vector

    parent = copy_with(base, tmp_path / "parent", add_noise(seed=1, scale=0.02))
    tuned = copy_with(parent, tmp_path / "tuned", add_noise(seed=2, scale=0.06))
    first, second = load_pair(base, parent), load_pair(parent, tuned)
    table = lineage_table(first, second)
    one, two, whole = (tuning_vector(pair) for pair in (first, second, load_pair(base, tuned)))
    frame = table.to_frame()
    for row in [_model_row(table), *frame[frame["level"] == "kind"].to_dict("records")]:
        kinds = {row["kind"]} if row["level"] == "kind" else {c.kind for c in one}
        a, b, c = (_of_kinds(vector, kinds) for vector in (one, two, whole))
        assert row["tensors"] == len(a)
        assert row["norm_first"] == pytest.approx(a.norm())
        assert row["norm_second"] == pytest.approx(b.norm())
        assert row["norm_whole"] == pytest.approx(c.norm(), rel=1e-5)
        cosine = torch.dot(_flat(a), _flat(b)) / (a.norm() * b.norm())
        assert row["cosine_steps"] == pytest.approx(float(cosine), abs=1e-6)
        assert row["share_first"] == pytest.approx(a.dot(c) / c.norm() ** 2, abs=1e-5)
        assert row["share_first"] + row["share_second"] == pytest.approx(1)
    assert _model_row(table)["share_second"] == pytest.approx(0.9, abs=0.02)  # 6^2 of 2^2 + 6^2
    assert set(frame["level"]) == {"model", "kind", "part", "component"}
    single = frame[frame["component"] == "L1.W_in"].iloc[0]
    wanted = next(c for c in one if str(c) == "L1.W_in")
    assert single["norm_second"] == pytest.approx(two[wanted].norm())
    assert detour_warning(table) == ""


def test_a_sibling_given_as_the_parent_is_a_detour(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.steps import detour_warning, lineage_table

    sibling = copy_with(base, tmp_path / "sibling", add_noise(seed=1, scale=0.03))
    tuned = copy_with(base, tmp_path / "tuned", add_noise(seed=2, scale=0.03))
    table = lineage_table(load_pair(base, sibling), load_pair(sibling, tuned))
    assert _model_row(table)["cosine_steps"] == pytest.approx(-(0.5**0.5), abs=0.02)
    assert _model_row(table)["share_first"] == pytest.approx(0, abs=0.02)
    assert "sibling may be no parent of tuned" in detour_warning(table)


def test_embedding_rows_count_where_all_three_have_the_token(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.steps import lineage_table

    order = [*range(59, -1, -1), 60, 61, 62, 63]
    parent = resized(base, tmp_path / "parent", [*order, None])
    word_tokenizer(parent, WORDS[::-1], added=("<x>",))
    plant = copy_with(parent, tmp_path / "planted", lambda t: t[EMBED][59].add_(0.5))  # w0
    tuned = copy_with(plant, tmp_path / "tuned", lambda t: t[EMBED][[59, 60]].add_(0.0))
    again = copy_with(tuned, tmp_path / "again", lambda t: t[EMBED][59:61].add_(0.25))
    table = lineage_table(load_pair(base, plant), load_pair(plant, again))
    row = table.where(component="embed.W_E").to_frame().iloc[0]
    assert row["norm_first"] == pytest.approx(0.5 * 32**0.5)
    assert row["norm_second"] == pytest.approx(0.25 * 32**0.5)  # <x> is not in the base
    assert row["cosine_steps"] == pytest.approx(1)
    assert row["share_first"] == pytest.approx(2 / 3)


EMBED = "model.embed_tokens.weight"


def test_a_step_that_unties_the_embedding_divides_both_uses(tmp_path: Path) -> None:
    import json

    from tvlens.weights.matching import load_pair
    from tvlens.weights.steps import lineage_table

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    parent = copy_with(base, tmp_path / "parent", lambda t: t[EMBED][5].add_(1.0))
    untied = copy_with(
        parent, tmp_path / "untied", lambda t: t.update({"lm_head.weight": t[EMBED].clone() * 1.0})
    )
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tuned = copy_with(untied, tmp_path / "tuned", lambda t: t["lm_head.weight"][5].add_(1.0))
    table = lineage_table(load_pair(base, parent), load_pair(parent, tuned))
    rows = table.where(level="component").to_frame().set_index("component")
    assert rows.loc["embed.W_E", "share_first"] == 1
    assert rows.loc["unembed.W_U", "share_first"] == pytest.approx(0.5)
    assert rows.loc["unembed.W_U", "norm_whole"] == pytest.approx(2 * 32**0.5)


def test_an_adapter_of_the_parent_is_the_second_step(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.steps import lineage_table
    from tvlens.weights.vector import tuning_vector

    parent = copy_with(base, tmp_path / "parent", add_noise(seed=1, scale=0.02))
    second = load_pair(parent, tiny_adapter(parent, tmp_path / "adapter"))
    row = _model_row(lineage_table(load_pair(base, parent), second))
    assert row["norm_second"] == pytest.approx(tuning_vector(second).norm(), rel=1e-5)


def test_steps_that_do_not_meet_are_refused(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.steps import lineage_table

    one, two = (copy_with(base, tmp_path / n, add_noise(seed=len(n))) for n in ("one", "three"))
    with pytest.raises(IncomparableModelsError, match="does not end where the step"):
        lineage_table(load_pair(base, one), load_pair(two, base))
