"""Merges of whole checkpoints: mergekit's bytes, LoRA algebra, scopes, ties, vocabularies."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden_models import CONFIGS, golden_models
from tests.tiny_checkpoints import (
    add_noise,
    copy_with,
    tiny_adapter,
    tiny_gpt2,
    tiny_llama,
    tiny_neox,
    tiny_phi3,
)
from tvlens.components import Component
from tvlens.errors import IncomparableModelsError, SelectionError, StudyError

pytestmark = pytest.mark.slow

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mergekit.json").read_text())
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAKERS: dict[str, Callable[..., Path]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "neox": tiny_neox,
    "phi3": tiny_phi3,
}


def _merge(base, vectors, **options):
    from tvlens.compose.combining import merge

    return merge(base, vectors, **options)


def _stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("golden")
    return {family: golden_models(root, family) for family in CONFIGS}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llama")
    base = tiny_llama(root / "base")
    return {
        "base": base,
        "a": copy_with(base, root / "a", add_noise(1)),
        "b": copy_with(base, root / "b", add_noise(2)),
        "lora": tiny_adapter(base, root / "lora"),
        "lora2": tiny_adapter(base, root / "lora2", seed=5, rslora=True),
    }


@pytest.mark.parametrize("case", sorted(GOLDEN["cases"]))
def test_the_bytes_are_mergekits(golden: dict[str, dict[str, Path]], case: str) -> None:
    about = GOLDEN["cases"][case]
    models = golden[case.split()[0]]
    found = _merge(
        models["base"],
        [models[name] for name in ("a", "b", "c")[: len(about["scales"])]],
        scales=about["scales"],
        method=f"mergekit:{about['merge_method']}",
        density=about["density"],
    )
    new = _stored(models["base"]) | dict(found.tensors())
    assert {name: _sha256(tensor) for name, tensor in new.items()} == about["sha256"]


@pytest.mark.parametrize("family", MAKERS)
def test_a_merge_of_one_is_the_vector_applied(family: str, tmp_path: Path) -> None:
    """``apply_to`` goes by canonical components, ``merge`` by stored tensors."""
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    base = MAKERS[family](tmp_path / "base")
    tuned = copy_with(base, tmp_path / "tuned", add_noise(1))
    vector = tuning_vector(load_pair(base, tuned))
    for options, applied in (
        ({"scales": -0.5}, -0.5 * vector),
        ({"select": "L1H2,L0N3,L1.ln2"}, vector.select("L1H2,L0N3,L1.ln2")),
    ):
        found = dict(_merge(base, [tuned], **options).tensors())
        wanted = dict(applied.apply_to(base))
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("method", ["task", "linear", "ties", "dare"])
def test_whole_checkpoints_follow_the_formula(llama: dict[str, Path], method: str) -> None:
    """TIES trims over the whole vector: the oracle lays it out flat and sorts it."""
    from tvlens.compose.merging import METHODS, drawn

    base, names = _stored(llama["base"]), sorted(_stored(llama["base"]))
    scales, density = [0.7, -0.4], METHODS[method].density
    vectors = []
    for number, tuned in enumerate(("a", "b")):
        changes = {n: _stored(llama[tuned])[n] - base[n] for n in names}
        if method == "ties":
            flat = torch.cat([changes[n].abs().flatten() for n in names])
            cut = flat.sort(descending=True).values[int(density * len(flat)) - 1]
            changes = {n: torch.where(c.abs() >= cut, c, 0) for n, c in changes.items()}
        if method == "dare":
            changes = {
                n: drawn(density, 1 / density, seed=7, label=f"{number} {n}")(c.flatten()).view(
                    c.shape
                )
                for n, c in changes.items()
            }
        vectors.append(changes)
    found = dict(
        _merge(
            llama["base"], [llama["a"], llama["b"]], scales=scales, method=method, seed=7
        ).tensors()
    )
    for name in names:
        scaled = torch.stack([s * v[name].double() for s, v in zip(scales, vectors, strict=True)])
        total = scaled.sum(0)
        if method == "linear":
            total = total / sum(scales)
        if method == "ties":
            agree = (scaled * total) > 0
            total = torch.where(agree, scaled, 0).sum(0) / agree.sum(0).clamp(min=1)
        change = found.get(name, base[name]).double() - base[name].double()
        largest = float(total.abs().max())
        ulp = float(base[name].abs().max()) * 2.0**-23
        assert float((change - total).abs().max()) <= 1e-6 * largest + ulp, name


def test_lora_sums_are_exact_and_stay_in_factors(llama: dict[str, Path]) -> None:
    """peft adds factors, which is another matrix; here B A + B' A' is what comes out."""
    from tvlens.weights.delta import LowRank

    found = _merge(llama["base"], [llama["lora"], llama["lora2"]], scales=[1.5, -0.5])
    query = Component("matrix", 1, None, "W_Q")
    delta = found.delta(query)
    assert isinstance(delta, LowRank)
    assert delta.rank == 8
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    expected = torch.zeros(32, 32, dtype=torch.float64)
    for name, scale, scaling in (("lora", 1.5, 6 / 4), ("lora2", -0.5, 6 / 4**0.5)):
        factors = load_file(llama[name] / "adapter_model.safetensors")
        a, b = (factors[f"{stem}{side}.weight"].double() for side in "AB")
        expected += scale * scaling * (b @ a)
    largest = float(expected.abs().max())
    assert float((delta.dense().double().T - expected).abs().max()) <= 1e-6 * largest
    new = dict(found.tensors())["model.layers.1.self_attn.q_proj.weight"]
    base = _stored(llama["base"])["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(new.double(), base.double() + expected, rtol=0, atol=6e-8)


def test_every_kind_of_input_gives_the_same_merge(llama: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    pair = load_pair(llama["base"], llama["a"])
    vector = tuning_vector(pair)
    file = tmp_path / "v.safetensors"
    vector.save(file)
    wanted = dict(_merge(llama["base"], [llama["a"], llama["lora"]], method="ties").tensors())
    for given in (pair, vector, file, str(file)):
        found = dict(_merge(llama["base"], [given, llama["lora"]], method="ties").tensors())
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", ["task", "ties", "mergekit:ties", "dare"])
def test_a_scope_leaves_the_rest_and_trims_within_itself(
    llama: dict[str, Path], method: str
) -> None:
    options = {"method": method, "density": None if method == "task" else 0.25}
    found = _merge(llama["base"], [llama["a"]], select="L1H2", **options)
    new, base = dict(found.tensors()), _stored(llama["base"])
    stem = "model.layers.1.self_attn."
    assert new.keys() == {f"{stem}q_proj.weight", f"{stem}o_proj.weight"}
    kept = {"q": (slice(16, 24), slice(None)), "o": (slice(None), slice(16, 24))}
    for letter, place in kept.items():
        name = f"{stem}{letter}_proj.weight"
        changed = new[name] != base[name]
        inside = int(changed[place].sum())
        assert inside == int(changed.sum())
        if method == "mergekit:ties":
            assert inside == int(0.25 * 8 * 32)
        if method == "ties":
            assert 0 < inside < 8 * 32
    if method == "ties":
        changes = [int((new[n] != base[n]).sum()) for n in new]
        assert sum(changes) == int(0.25 * 2 * 8 * 32)


def test_the_vector_of_a_merge_is_what_the_merge_adds(llama: dict[str, Path]) -> None:
    found = _merge(llama["base"], [llama["a"], llama["lora"]], method="ties", scales=0.5)
    wanted, applied = dict(found.tensors()), dict(found.vector().apply_to(llama["base"]))
    assert applied.keys() == wanted.keys()
    for name, tensor in applied.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-7)


def test_a_tied_base_stays_tied_and_a_stored_copy_follows(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    tuned = copy_with(base, tmp_path / "t", add_noise(1))

    def twice(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBED].clone()

    doubled = copy_with(base, tmp_path / "doubled", twice)
    assert HEAD not in dict(_merge(base, [tuned], method="dare").tensors())
    new = dict(_merge(doubled, [tuned], method="dare", seed=1).tensors())
    assert torch.equal(new[HEAD], new[EMBED])
    assert not torch.equal(new[HEAD], _stored(base)[EMBED])


def test_vectors_that_tie_and_part_the_ends_meet(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    tied = copy_with(base, tmp_path / "tied", add_noise(1))
    untied = tiny_llama(tmp_path / "untied", seed=4)
    found = _merge(base, [tied, untied], scales=[0.5, 0.25])
    new, start = dict(found.tensors()), _stored(base)[EMBED].double()
    assert found.config_changes == {"tie_word_embeddings": False}
    for name in (EMBED, HEAD):
        wanted = start + 0.5 * (_stored(tied)[EMBED].double() - start)
        wanted += 0.25 * (_stored(untied)[name].double() - start)
        torch.testing.assert_close(new[name].double(), wanted, rtol=0, atol=1e-7)
    assert _merge(base, [tied, untied], select="layer == 0").config_changes == {}


def test_rows_of_other_vocabularies_find_their_places(tmp_path: Path) -> None:
    """The second fine-tune has three rows more; a merge has the base's rows."""
    base = tiny_llama(tmp_path / "base")
    tuned = copy_with(base, tmp_path / "a", add_noise(1))

    def lengthen(tensors: dict[str, Tensor]) -> None:
        add_noise(2)(tensors)
        for name in (EMBED, HEAD):
            tensors[name] = torch.cat([tensors[name], torch.ones(3, 32)])

    longer = copy_with(base, tmp_path / "b", lengthen)
    config = json.loads((longer / "config.json").read_text()) | {"vocab_size": 67}
    (longer / "config.json").write_text(json.dumps(config))
    for folder, rows in ((base, 64), (longer, 67)):
        words = {f"t{i}": i for i in range(rows)}
        content = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    found = _merge(base, [tuned, longer], scales=[1.0, 1.0])
    assert any("3 embedding rows that base lacks" in note for note in found.notes)
    new = dict(found.tensors())
    for name in (EMBED, HEAD):
        start = _stored(base)[name].double()
        wanted = _stored(tuned)[name].double() + _stored(longer)[name].double()[:64] - start
        torch.testing.assert_close(new[name].double(), wanted, rtol=0, atol=1e-7)


def test_permuted_rows_are_put_back(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def permute(tensors: dict[str, Tensor]) -> None:
        add_noise(2)(tensors)
        for name in (EMBED, HEAD):
            tensors[name] = tensors[name][order]

    moved = copy_with(base, tmp_path / "b", permute)
    for folder, numbers in ((base, range(64)), (moved, order.argsort().tolist())):
        words = {f"t{i}": number for i, number in enumerate(numbers)}
        content = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    new = dict(_merge(base, [moved]).tensors())
    for name in (EMBED, HEAD):
        wanted = _stored(moved)[name][order.argsort()]
        torch.testing.assert_close(new[name], wanted, rtol=0, atol=1e-7)


def test_numbers_that_do_not_fit_are_refused_in_a_sentence(llama: dict[str, Path]) -> None:
    two = [llama["a"], llama["b"]]
    with pytest.raises(StudyError, match="got 3 scales for 2 vectors"):
        _merge(llama["base"], two, scales=[1.0, 2.0, 3.0])
    with pytest.raises(StudyError, match="no merge method 'average'; there are task, linear"):
        _merge(llama["base"], two, method="average")
    with pytest.raises(StudyError, match="density is more than 0 and at most 1, got 0"):
        _merge(llama["base"], two, method="ties", density=0.0)
    with pytest.raises(StudyError, match="sum to zero"):
        _merge(llama["base"], two, scales=[1.0, -1.0], method="linear")
    with pytest.raises(StudyError, match="finite scales"):
        _merge(llama["base"], two, scales=float("nan"))
    with pytest.raises(StudyError, match="at least one vector"):
        _merge(llama["base"], [])
    with pytest.raises(SelectionError, match="no 'L9H1'"):
        _merge(llama["base"], two, select="L9H1")


def test_a_vector_of_another_base_is_refused(llama: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    vector = tuning_vector(load_pair(llama["base"], llama["a"]))
    other = tiny_llama(tmp_path / "other", seed=9)
    with pytest.raises(IncomparableModelsError, match=r"embed\.W_E of this model is not that"):
        _merge(other, [vector])
    assert dict(_merge(other, [vector], any_base=True).tensors())
    with pytest.raises(StudyError, match="cannot be merged into other"):
        _merge(other, [load_pair(llama["base"], llama["a"])])


def test_a_vector_in_a_file_is_read_a_component_at_a_time(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector
    from tvlens.weights.vector_file import load_vector, open_vector

    file = tmp_path / "v.safetensors"
    tuning_vector(load_pair(llama["base"], llama["lora"])).save(file)
    lazy, whole = open_vector(file), load_vector(file)
    assert list(lazy) == list(whole)
    assert isinstance(whole.deltas, dict)
    assert not isinstance(lazy.deltas, dict)
    for component in lazy:
        assert type(lazy[component]) is type(whole[component])
        assert torch.equal(lazy[component].dense(), whole[component].dense())
