"""Known changes on top of a real control delta: found with sign and size, and little else.

Every tensor of demo:base moves along the control's tuning vector, scaled to 0.5 % of the tensor's
norm, so that nothing is untouched. On top: one head's W_O longer by 5 %, one direction written by
20 neurons of a layer at 5 % of each neuron's norm, one norm's gain larger by 5 %.
"""

import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.tiny_checkpoints import copy_with

pytestmark = pytest.mark.slow

BACKGROUND, SIZE = 0.005, 0.05
HEAD, NORM, WRITERS = (5, 2), (3, "ln2.w"), (4, range(40, 60))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    from safetensors.torch import load_file

    from tvlens import classify, decompose, load_pair
    from tvlens.demo.models import demo_folder

    control = load_file(demo_folder("ctl") / "model.safetensors")

    def plant(tensors: dict[str, Tensor]) -> None:
        for name, base in list(tensors.items()):
            delta = control[name] - base
            delta *= BACKGROUND * base.norm() / delta.norm()
            tensors[name] = base + delta + _planted(name, base)

    folder = copy_with(demo_folder("base"), tmp_path_factory.mktemp("planted") / "tuned", plant)
    (folder / "tvlens_storage.json").unlink()  # the planted copy is fp32, not rounded
    pair = load_pair("demo:base", folder)
    weights = decompose(pair)
    labels = classify(pair, weights)
    return {"weights": weights.to_frame(), "labels": labels.labels.to_frame()}


def _planted(name: str, base: Tensor) -> Tensor:
    added = torch.zeros_like(base)
    if name == f"model.layers.{HEAD[0]}.self_attn.o_proj.weight":
        columns = slice(HEAD[1] * 24, HEAD[1] * 24 + 24)
        added[:, columns] = SIZE * base[:, columns]
    if name == f"model.layers.{WRITERS[0]}.mlp.down_proj.weight":
        direction = torch.randn(len(base), generator=torch.Generator().manual_seed(0))
        columns = list(WRITERS[1])
        norms = base[:, columns].norm(dim=0)
        added[:, columns] = SIZE * direction[:, None] / direction.norm() * norms
    if name == f"model.layers.{NORM[0]}.post_attention_layernorm.weight":
        added = SIZE * base
    return added


def _is_head(rows: pd.DataFrame) -> pd.Series:
    return (rows["layer"] == HEAD[0]) & (rows["index"] == HEAD[1])


def _is_writer(rows: pd.DataFrame) -> pd.Series:
    return (rows["layer"] == WRITERS[0]) & rows["index"].isin(WRITERS[1])


def test_the_amplified_head_is_found_with_sign_and_size(tables: dict[str, pd.DataFrame]) -> None:
    labels = tables["labels"].query("kind == 'head' and part == 'OV'")
    assert labels[_is_head(labels)]["label"].tolist() == ["amplified"]
    weights = tables["weights"].query("kind == 'head' and part == 'W_O'")
    # 0.05 and what the background of 0.005 has along the head's own direction
    assert weights[_is_head(weights)]["gain"].item() == pytest.approx(SIZE, abs=0.002)


def test_no_other_head_is_called_amplified_or_attenuated(tables: dict[str, pd.DataFrame]) -> None:
    labels = tables["labels"].query("kind == 'head' and part == 'OV'")
    others = labels[~_is_head(labels)]["label"]
    false = others.isin(["amplified", "attenuated"]).sum()
    print(f"false amplified or attenuated heads: {false} of {len(others)}")
    assert false <= 0.05 * len(others)


def test_the_writers_of_one_new_direction_are_found(tables: dict[str, pd.DataFrame]) -> None:
    labels = tables["labels"].query("kind == 'neuron' and part == 'W_out'")
    found = labels[_is_writer(labels)]["label"]
    assert (found == "new_write").mean() >= 0.95
    others = labels[~_is_writer(labels)]["label"]
    false = others.isin(["amplified", "attenuated"]).sum()
    print(f"false amplified or attenuated neurons: {false} of {len(others)}")
    assert false <= 0.05 * len(others)


def test_the_writers_have_the_size_that_was_planted(tables: dict[str, pd.DataFrame]) -> None:
    weights = tables["weights"].query("kind == 'neuron' and part == 'W_out'")
    sizes = weights[_is_writer(weights)]["relative_delta"]
    assert sizes.between(SIZE - 0.012, SIZE + 0.012).all()  # the background adds up to 0.01


def test_the_changed_norm_is_the_largest_change_of_its_kind(
    tables: dict[str, pd.DataFrame],
) -> None:
    norms = tables["weights"].query("kind == 'norm'").sort_values("relative_delta")
    assert (norms["layer"].iloc[-1], norms["part"].iloc[-1]) == NORM
    assert norms["gain"].iloc[-1] == pytest.approx(SIZE, abs=BACKGROUND)
    assert norms["relative_delta"].iloc[-2] <= 1.01 * BACKGROUND


def test_a_classifier_that_always_says_unresolved_would_fail_these(
    tables: dict[str, pd.DataFrame],
) -> None:
    labels = tables["labels"].assign(label="unresolved")
    head = labels.query("kind == 'head' and part == 'OV'")
    assert head[_is_head(head)]["label"].tolist() != ["amplified"]
    assert not (labels["label"] == "new_write").any()
