"""Copies of one function in other coordinates are told from models that changed, and read alike."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tests import gauge_copies as copies
from tests.gauge_copies import Edit, Views, saved_copy
from tests.test_weights_vocabulary import WORDS, word_tokenizer
from tests.tiny_checkpoints import FAMILIES, add_noise, copy_with, tiny_adapter, tiny_gpt2
from tvlens.errors import StudyError

BY = {
    "permuted": (copies.PERMUTED, {"permutation"}),
    "rotated": (copies.ROTATED, {"rotation"}),
    "rescaled": ((copies.rescale_neurons, *copies.RESCALED), {"scale", "gain"}),
    "all": (copies.ALL, {"permutation", "rotation", "scale", "gain"}),
}
GRID = [(family, how) for family in FAMILIES for how in BY]
GRID = [(f, how) for f, how in GRID if how == "all" or f not in ("mistral", "gemma3")]
TRAINED = {
    "q_proj": "W_Q",
    "k_proj": "W_K",
    "v_proj": "W_V",
    "o_proj": "W_O",
    "up_proj": "W_in",
    "down_proj": "W_out",
    "input_layernorm": "ln1.w",
}
UNSCALED = ("gpt2", "neox")
"""Families whose neurons have no factor of their own."""
ROUNDED = {torch.float32: 1e-7, torch.bfloat16: 4e-3}
"""Largest residual of a copy that was rounded once when it was stored."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gauge")


@pytest.fixture(scope="module")
def bases(root: Path) -> dict[str, Path]:
    return {name: make(root / name) for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def llama(bases: dict[str, Path]) -> Path:
    word_tokenizer(bases["llama"], WORDS)
    return bases["llama"]


def _pair(base: Path, tuned: Path, **options):
    from tvlens.weights.matching import load_pair

    return load_pair(base, tuned, **options)


def _canonical(base: Path, tuned: Path):
    from tvlens.weights.gauge import canonical

    return canonical(_pair(base, tuned))


def _judged(base: Path, tuned: Path):
    return _pair(base, tuned).load_report.same_function


# --- the same function --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), GRID)
def test_a_copy_that_computes_the_same_is_called_the_same_function(
    bases: dict[str, Path], tmp_path: Path, family: str, how: str
) -> None:
    edits, by = BY[how]
    model = copies.live(bases[family])
    before = copies.logits(model)
    copies.apply(model, edits)
    torch.testing.assert_close(copies.logits(model), before, rtol=0, atol=2e-5)
    pair = _pair(bases[family], saved_copy(bases[family], tmp_path / "copy", edits))
    found = pair.load_report.same_function
    assert found.value is True, found.reason
    assert set(found.by) == by - ({"scale"} if family in UNSCALED else set())
    assert found.residual < ROUNDED[torch.float32]
    assert any("compute the same function" in warning for warning in pair.load_report.warnings)
    assert pair.load_report.identical is False


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_copies_rounded_to_bfloat16_are_the_same_function_up_to_that_rounding(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    base = saved_copy(bases[family], tmp_path / "base", (), dtype=torch.bfloat16)
    copy = saved_copy(base, tmp_path / "copy", copies.ALL, dtype=torch.bfloat16)
    found = _judged(base, copy)
    assert found.value is True, found.reason
    assert 1e-4 < found.residual < ROUNDED[torch.bfloat16]


@pytest.mark.slow
def test_heads_with_directions_of_very_different_strength_are_aligned_too(tmp_path: Path) -> None:
    """A basis is fitted to rounded weights; in the weakest direction it is least certain."""

    def uneven(model: nn.Module, views: Views, generator: torch.Generator) -> None:
        for head in (*views["V"], *views["K"]):
            head.mul_(torch.logspace(0, -2, len(head))[:, None])

    base = tiny_gpt2(tmp_path / "even", n_embd=64)
    base = saved_copy(base, tmp_path / "base", (uneven,), dtype=torch.bfloat16)
    copy = saved_copy(base, tmp_path / "copy", copies.ALL, dtype=torch.bfloat16)
    assert _judged(base, copy).value is True


@pytest.mark.slow
def test_neurons_behind_a_relu_have_a_positive_factor(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "base", activation_function="relu")
    edits = (copies.rescale_neurons, copies.permute_neurons)
    found = _judged(base, saved_copy(base, tmp_path / "copy", edits))
    assert (found.value, found.by) == (True, ("permutation", "scale"))


@pytest.mark.slow
def test_a_bfloat16_twin_differs_by_rounding_alone(llama: Path, tmp_path: Path) -> None:
    pair = _pair(llama, saved_copy(llama, tmp_path / "twin", (), dtype=torch.bfloat16))
    found = pair.load_report.same_function
    assert (found.value, found.by) == (True, ())
    assert 0 < found.residual < 2e-3
    assert any("by rounding alone" in warning for warning in pair.load_report.warnings)


def test_identical_models_are_the_same_function_by_nothing(llama: Path, tmp_path: Path) -> None:
    found = _judged(llama, copy_with(llama, tmp_path / "same", lambda tensors: None))
    assert found.to_dict() == {"value": True, "by": [], "residual": 0.0, "reason": ""}


# --- another function ---------------------------------------------------------------------------


def _wrong(edit: str) -> Edit:
    """An edit whose second half is not the inverse of its first."""

    def wrong(model: nn.Module, views: Views, generator: torch.Generator) -> None:
        factors = copies._factors(len(views[edit]), generator)
        views[edit].mul_(factors[:, None] if views[edit].dim() == 2 else factors)
        partner = {"in": "out", "ln1": "V"}[edit]
        views[partner].mul_(factors[:, None] if edit == "in" else factors)

    return wrong


def _transposed_value_basis(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    basis = torch.randn(*[views["V"].shape[1]] * 2, generator=generator, dtype=torch.float64)
    for head in range(len(views["V"])):
        copies._turn(views, "V", head, basis)
    for head in range(len(views["O"])):
        copies._turn(views, "O", head, torch.linalg.inv(basis))


def _heads_across_groups(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    for name in "QO":
        views[name].copy_(views[name].roll(1, 0).clone())


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [_wrong("in"), _wrong("ln1"), _transposed_value_basis, _heads_across_groups],
    ids=["neuron", "gain", "value", "heads"],
)
def test_a_copy_with_a_wrong_inverse_is_another_function(
    llama: Path, tmp_path: Path, edit: Edit
) -> None:
    model = copies.live(llama)
    before = copies.logits(model)
    copies.apply(model, (edit,))
    assert (copies.logits(model) - before).abs().max() > 1e-3
    assert _judged(llama, saved_copy(llama, tmp_path / "wrong", (edit,))).value is False


@pytest.mark.slow
def test_keys_turned_across_rotary_pairs_are_another_function(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Without rotary positions any basis would do; with them it must not be accepted."""

    def turn(model: nn.Module, views: Views, generator: torch.Generator) -> None:
        basis = torch.randn(*[views["K"].shape[1]] * 2, generator=generator, dtype=torch.float64)
        for head in range(len(views["K"])):
            copies._turn(views, "K", head, basis)
            copies._turn(views, "Q", head, torch.linalg.inv(basis).T)

    for family, same in (("gpt2", True), ("neox", False)):
        copy = saved_copy(bases[family], tmp_path / family, (turn,))
        assert _judged(bases[family], copy).value is same


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_a_noise_copy_of_the_same_size_is_another_function(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """As far from the base as the copy in other coordinates, entry by entry."""
    copy = saved_copy(bases[family], tmp_path / "copy", copies.ALL)
    pair = _pair(bases[family], copy)
    sizes = {c: pair.read(c).dense_delta().std(correction=0) for c in pair.components}

    def noise(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(4)
        size = max(sizes.values())
        for name, tensor in tensors.items():
            tensors[name] = tensor + torch.randn(tensor.shape, generator=generator) * size

    found = _judged(bases[family], copy_with(bases[family], tmp_path / "noise", noise))
    assert found.value is False
    assert found.residual > 0.01
    assert "differs by" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_small_change_of_one_neuron_shows_through_every_change_of_coordinates(
    llama: Path, tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    """A change of one neuron in 48, some 20 times the rounding of one number."""

    def change(model: nn.Module, views: Views, generator: torch.Generator) -> None:
        neuron = views["in"][7]
        across = torch.randn(32, generator=generator, dtype=torch.float64)
        neuron.add_(across * size * neuron.norm() / across.norm())

    base = saved_copy(llama, tmp_path / "base", (), dtype=dtype)
    same = saved_copy(base, tmp_path / "same", copies.ALL, dtype=dtype)
    assert _judged(base, same).value is True
    found = _judged(base, saved_copy(base, tmp_path / "copy", (change, *copies.ALL), dtype=dtype))
    assert found.value is False
    assert found.reason.startswith("L0.W_in differs by")


@pytest.mark.slow
def test_a_dead_neuron_does_not_disturb_the_others(llama: Path, tmp_path: Path) -> None:
    def kill(model: nn.Module, views: Views, generator: torch.Generator) -> None:
        views["in"][3].zero_()
        views["gate"][4].zero_()

    base = saved_copy(llama, tmp_path / "base", (kill,))
    found = _judged(base, saved_copy(base, tmp_path / "copy", copies.ALL))
    assert found.value is True, found.reason
    pair = _canonical(llama, base)
    assert all(pair.read(c).dense_delta().abs().max() < 10 for c in pair.components)


def test_a_fine_tune_with_its_embeddings_frozen_is_another_function(
    llama: Path, tmp_path: Path
) -> None:
    def train(tensors: dict[str, Tensor]) -> None:
        kept = {n: t.clone() for n, t in tensors.items() if "embed" in n or "lm_head" in n}
        add_noise(scale=1e-4)(tensors)
        tensors.update(kept)

    found = _judged(llama, copy_with(llama, tmp_path / "tuned", train))
    assert found.value is False
    assert found.reason.startswith("L0.")


def test_a_small_change_in_bfloat16_is_no_rounding(llama: Path, tmp_path: Path) -> None:
    """A tenth of the entries move by one spacing: less energy than rounding all of them has."""
    base = saved_copy(llama, tmp_path / "base", (), dtype=torch.bfloat16)

    def nudge(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "mlp" in name:
                step = (torch.rand(tensor.shape) < 0.1) * tensor * 2.0**-7
                tensors[name] = tensor + step.to(tensor.dtype)

    found = _judged(base, copy_with(base, tmp_path / "tuned", nudge))
    assert found.value is False
    assert found.residual < 1e-2


def test_what_cannot_be_judged_is_null_with_a_reason(llama: Path, tmp_path: Path) -> None:
    adapter = _judged(llama, tiny_adapter(llama, tmp_path / "adapter"))
    assert (adapter.value, adapter.residual) == (None, None)
    assert "adapter" in adapter.reason
    unread = _pair(llama, tmp_path / "adapter", scan=False).load_report.same_function
    assert (unread.value, unread.reason) == (None, "the contents were not read")
    other = FAMILIES["llama"](tmp_path / "theta", rope_theta=5e4)
    assert "rope_theta" in _judged(llama, other).reason


# --- the base's coordinates ---------------------------------------------------------------------


def _changed_neuron(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    views["in"][7].add_(torch.randn(32, generator=generator, dtype=torch.float64) * 0.1)


@pytest.mark.slow
def test_one_changed_neuron_of_a_permuted_copy_is_all_that_is_left(
    llama: Path, tmp_path: Path
) -> None:
    edits = (_changed_neuron, copies.permute_neurons, copies.permute_heads)
    copy = saved_copy(llama, tmp_path / "copy", edits)
    assert _judged(llama, copy).value is False
    pair = _canonical(llama, copy)
    changed = set()
    for component in pair.components:
        weight = pair.read(component)
        above = weight.dense_delta().square() > 4 * weight.floor
        axis = 1 if component.part == "W_out" else 0
        if bool(above.any()):
            changed |= {(component.part, int(n)) for n in above.any(axis).nonzero()}
    assert changed == {("W_in", 7)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["permuted", "all"])
def test_one_changed_neuron_shows_through_every_change_of_coordinates(
    llama: Path, tmp_path: Path, how: str
) -> None:
    copy = saved_copy(llama, tmp_path / "copy", (_changed_neuron, *BY[how][0]))
    pair = _canonical(llama, copy)
    for component in pair.components:
        delta = pair.read(component).dense_delta()
        if component.part in ("W_in", "W_out"):
            lengths = delta.norm(dim=0 if component.part == "W_in" else 1)
            assert int(lengths.argmax()) == 7 or float(lengths.max()) < 1e-5
            lengths[7] = 0
            assert float(lengths.max()) < 1e-5
        else:
            assert float(delta.norm()) < 1e-5, component


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "qwen3", "gemma2", "olmo2"])
def test_a_copy_of_a_fine_tune_is_read_like_the_fine_tune_itself(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    tuned = copy_with(bases[family], tmp_path / "tuned", add_noise(scale=0.02))
    copy = saved_copy(tuned, tmp_path / "copy", copies.ALL)
    first, second = (_canonical(bases[family], folder) for folder in (tuned, copy))
    raw = _pair(bases[family], tuned)
    for component in first.components:
        ours, theirs = first.read(component), second.read(component)
        torch.testing.assert_close(
            theirs.dense_delta(), ours.dense_delta(), rtol=0, atol=3e-6, msg=str(component)
        )
        torch.testing.assert_close(first.tuned_weight(component), ours.base + ours.dense_delta())
        stored = raw.read(component).dense_delta()
        if component.kind == "matrix":  # what a fine-tune learned stays, but for what has no effect
            cosine = (stored * ours.dense_delta()).sum() / stored.norm() / ours.dense_delta().norm()
            assert cosine > 0.85, component


@pytest.mark.slow
def test_a_canonical_reading_computes_what_the_tuned_model_does(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Its deltas on the base's weights make a model with the tuned model's logits."""
    from tvlens.weights.stored import new_tensors
    from tvlens.weights.vector import tuning_vector

    for family in ("llama", "gpt2", "gemma3"):
        base = bases[family]
        tuned = copy_with(base, tmp_path / f"{family} tuned", add_noise(scale=0.05))
        pair = _canonical(base, saved_copy(tuned, tmp_path / f"{family} copy", copies.ALL))
        vector = tuning_vector(pair)
        deltas = {component: vector[component] for component in vector}
        new = {t.name: t.tensor for t in new_tensors(_pair(base, base), deltas)}
        made = copy_with(
            base, tmp_path / f"{family} made", lambda tensors, n=new: tensors.update(n)
        )
        logits = [copies.logits(copies.live(folder)) for folder in (made, tuned, base)]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-4)
        assert (logits[2] - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("trained", [*TRAINED])
def test_what_was_not_trained_stays_as_it_is(llama: Path, tmp_path: Path, trained: str) -> None:
    """One matrix alone: what it is multiplied with takes no share of its change."""

    def train(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(2)
        for name, tensor in tensors.items():
            if trained in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.02)

    pair = _canonical(llama, copy_with(llama, tmp_path / "tuned", train))
    for component in pair.components:
        delta = pair.read(component).dense_delta()
        own = component.part == TRAINED[trained]
        assert float(delta.norm()) > 0.05 if own else float(delta.abs().max()) < 1e-6, component


@pytest.mark.slow
def test_floors_follow_the_weights_into_the_base_coordinates(llama: Path, tmp_path: Path) -> None:
    """A neuron that a copy stores a thousand times longer was rounded so much more coarsely."""

    def stretch(model: nn.Module, views: Views, generator: torch.Generator) -> None:
        views["in"][3].mul_(1024)
        views["out"][3].div_(1024)

    from tvlens.components import Component

    edits = (stretch, copies.permute_neurons)
    pair = _canonical(llama, saved_copy(llama, tmp_path / "copy", edits))
    own = _pair(llama, llama)
    for part in ("W_in", "W_out"):
        component = Component("matrix", 0, None, part)
        torch.testing.assert_close(pair.read(component).floor, own.read(component).floor)


def _tables(study: object, *names: str) -> list[pd.DataFrame]:
    return [study.table(name).to_frame() for name in names]


@pytest.mark.slow
def test_labels_of_a_copy_in_other_coordinates_are_those_of_the_fine_tune(
    llama: Path, tmp_path: Path
) -> None:
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    def train(model: nn.Module, views: Views, generator: torch.Generator) -> None:
        views["O"][2].mul_(1.1)
        views["out"][5].mul_(1.3)
        for view in views.values():
            noise = torch.randn(view.shape, generator=generator, dtype=torch.float64)
            view.add_(noise * 0.003)

    made, tuned = {}, llama
    for name, edits in (("tuned", (train,)), ("copy", copies.ALL)):
        tuned = saved_copy(tuned, tmp_path / name / "model", edits)  # the copy is of the first
        plan = StudyPlan(
            base=str(llama), tuned=(str(tuned),), stages=("decompose",), canonical=True
        )
        made[name] = run_study(plan, tmp_path / name / "study")
        assert StudyPlan.load(tmp_path / name / "study" / "study.yaml").canonical
        assert any("--canonical" in text for text in made[name].manifest["warnings"])
        assert "--canonical" in made[name].manifest["command"]
    for ours, theirs in zip(*(_tables(s, "weights", "labels") for s in made.values()), strict=True):
        pd.testing.assert_series_equal(ours["component"], theirs["component"])
        if "label" in ours:  # what the copy moved and nobody trained was rounded: below the floor
            ours, theirs = (table.replace("unchanged", "unresolved") for table in (ours, theirs))
        for column in {"label", "relative_delta", "gain", "cos_base_tuned"} & {*ours.columns}:
            pd.testing.assert_series_equal(ours[column], theirs[column], rtol=1e-2, atol=1e-4)
    facts = made["copy"].manifest["facts"]["model"]["canonical"]
    assert facts["neurons"] > 80
    assert facts["heads"] > 0
    assert made["tuned"].manifest["facts"]["model"]["canonical"] == {"neurons": 0, "heads": 0}


# --- refusals, the command line and the prompts -------------------------------------------------


@pytest.mark.slow
def test_an_adapter_has_the_bases_coordinates_already(llama: Path, tmp_path: Path) -> None:
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    adapter = tiny_adapter(llama, tmp_path / "adapter")
    assert _canonical(llama, adapter).moves is None
    plan = StudyPlan(base=str(llama), tuned=(str(adapter),), stages=("decompose",), canonical=True)
    study = run_study(plan, tmp_path / "study")
    said = [text for text in study.manifest["warnings"] if text.startswith("--canonical")]
    assert len(said) == 1
    assert "is an adapter" in said[0]


@pytest.mark.slow
def test_canonical_is_refused_where_it_means_nothing(llama: Path, tmp_path: Path) -> None:
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    plan = StudyPlan(base=str(llama), tuned=(str(llama),), stages=("decompose",), canonical=True)
    with pytest.raises(StudyError, match="--canonical and --parent exclude each other"):
        run_study(plan.model_copy(update={"parent": str(llama)}), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_copy_is_said_to_be_one_with_the_difference_of_its_logits(
    llama: Path, tmp_path: Path
) -> None:
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    copy = saved_copy(llama, tmp_path / "copy", copies.ALL)
    word_tokenizer(copy, WORDS)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1 w2 w3", "answer": " w4", "wrong": " w5"}\n')
    plan = StudyPlan(
        base=str(llama), tuned=(str(copy),), prompts=str(prompts), check_exact=3, check_nodes=2
    )
    study = run_study(plan, tmp_path / "study")
    found = study.load_report["same_function"]
    assert (found["value"], found["by"]) == (True, ["gain", "permutation", "rotation", "scale"])
    fact = study.manifest["facts"]["copy"]["same_function"]
    assert 0 < fact["logit_difference"] < 1e-4 < fact["logit_size"]
    assert any("their logits differ by" in text for text in study.manifest["warnings"])
    assert "compute the same function" in (tmp_path / "study" / "report.html").read_text()
