"""What a selection keeps of each matrix, checked against slices written by hand."""

import pytest
import torch

from tests.tiny_checkpoints import tiny_gpt2, tiny_llama
from tvlens.components import Component
from tvlens.errors import SelectionError


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory):
    from tvlens.weights.matching import load_pair

    root = tmp_path_factory.mktemp("slices")
    llama, gpt2 = tiny_llama(root / "llama"), tiny_gpt2(root / "gpt2")
    return {
        "llama": load_pair(llama, llama, scan=False).layout,
        "gpt2": load_pair(gpt2, gpt2, scan=False).layout,
    }


def _kept(layouts, text: str, family: str = "llama") -> dict[str, object]:
    """Label -> "whole", or the axis and the kept indices."""
    from tvlens.selection import parse_selection
    from tvlens.weights.slices import chosen

    found = chosen(parse_selection(text), layouts[family], base="b", tuned="t")
    return {
        str(c): "whole" if k.axis is None else (k.axis, k.entries.nonzero()[:, 0].tolist())
        for c, k in found.items()
    }


HEAD_2 = list(range(16, 24))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L1H2", {"L1.W_Q": (1, HEAD_2), "L1.W_O": (0, HEAD_2)}),
        ('site == "L1H2"', {"L1.W_Q": (1, HEAD_2), "L1.W_O": (0, HEAD_2)}),
        ("L1H2.W_Q", {"L1.W_Q": (1, HEAD_2)}),
        ("L0K1", {"L0.W_K": (1, [*range(8, 16)]), "L0.W_V": (1, [*range(8, 16)])}),
        (
            "L0G1",
            {
                "L0.W_Q": (1, [*range(16, 32)]),
                "L0.W_K": (1, [*range(8, 16)]),
                "L0.W_V": (1, [*range(8, 16)]),
                "L0.W_O": (0, [*range(16, 32)]),
            },
        ),
        ("L0N5", {"L0.W_gate": (1, [5]), "L0.W_in": (1, [5]), "L0.W_out": (0, [5])}),
        ("L1H2,L1H2.W_K,embed", None),
        ("embed, L1.ln2", {"embed.W_E": "whole", "L1.ln2.w": "whole"}),
        ("L0G0,L0H0,L0H3.W_O", {"L0.W_O": (0, [*range(16), *range(24, 32)])}),
        ('kind == "head" and layer == 0 and part == "W_O"', {"L0.W_O": "whole"}),
        (
            'kv_index == 1 and layer == 0 and part in ("W_Q", "W_K")',
            {"L0.W_Q": (1, [*range(16, 32)]), "L0.W_K": (1, [*range(8, 16)])},
        ),
        (
            'kind == "neuron" and index < 2 and layer == 1 and part == "W_out"',
            {"L1.W_out": (0, [0, 1])},
        ),
        ('kind == "norm" and layer is None', {"ln_final.w": "whole"}),
    ],
)
def test_sites_and_expressions_keep_the_right_rows_or_columns(
    layouts, text: str, expected: dict[str, object] | None
) -> None:
    if expected is None:
        with pytest.raises(SelectionError, match=r"this model has no 'L1H2\.W_K'"):
            _kept(layouts, text)
        return
    found = _kept(layouts, text)
    assert {label: found[label] for label in expected} == expected
    if not text.startswith("L0G0"):
        assert found == expected


def test_a_head_takes_its_bias_along(layouts) -> None:
    assert _kept(layouts, "L0H3", "gpt2") == {
        "L0.W_Q": (1, [*range(24, 32)]),
        "L0.W_O": (0, [*range(24, 32)]),
        "L0.b_Q": (0, [*range(24, 32)]),
    }
    assert set(_kept(layouts, "L0N3", "gpt2")) == {"L0.W_in", "L0.W_out", "L0.b_in"}


def test_not_is_a_true_complement(layouts) -> None:
    everything = {str(c) for c in layouts["llama"].components()}
    rest = _kept(layouts, 'not (kind == "head" and layer == 1 and index == 2)')
    assert set(rest) == everything
    assert rest.pop("L1.W_Q") == (1, [*range(16), *range(24, 32)])
    assert rest.pop("L1.W_O") == (0, [*range(16), *range(24, 32)])
    assert set(rest.values()) == {"whole"}
    assert _kept(layouts, 'not site == "L1H2"') == _kept(
        layouts, 'not (site == "L1H2" and kind == "head")'
    )
    others = set(_kept(layouts, 'kind != "head"'))
    assert everything - others == {"L0.W_Q", "L0.W_O", "L1.W_Q", "L1.W_O"}


def test_other_kinds_stay_whole_and_biases_can_be_left_out(layouts) -> None:
    kept = _kept(layouts, 'kind != "bias"', "gpt2")
    assert set(kept.values()) == {"whole"}
    assert not any(".b" in label for label in kept)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("index == 7", "uses index, which heads, kv heads, kv groups and neurons each count"),
        ('kind == "head" or kind == "matrix"', r"names the kinds head and matrix, which share"),
        ('kind in ("head", "kv_group")', r"head and kv_group, which share L0\.W_Q"),
        ('site == "L0H1" or site == "L0.attn"', "head and matrix, which share"),
        ("layer == 9", "selects nothing of this model"),
        ('kind == "node"', "selects nothing of this model"),
        ("L9H1", "this model has no 'L9H1'; it has for example embed"),
        ('site != "L9H1"', "this model has no 'L9H1'"),
        ('part != "W_X"', "this model has no 'W_X'; it has for example W_E"),
        ("expert == 1", "selects nothing"),
    ],
)
def test_selections_without_a_clear_meaning_are_refused(layouts, text: str, sentence: str) -> None:
    with pytest.raises(SelectionError, match=sentence):
        _kept(layouts, text)


def test_biases_and_heads_share_the_query_bias(layouts) -> None:
    with pytest.raises(SelectionError, match=r"head and bias, which share L0\.b_Q"):
        _kept(layouts, 'kind == "bias" or kind == "head"', "gpt2")
    assert _kept(layouts, 'kind == "norm" or kind == "head"')["L0.W_Q"] == "whole"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_slices_are_those_of_geometry(layouts, family: str) -> None:
    """An oracle written another way: the cuts that measures of heads and neurons use."""
    from tvlens.geometry.heads import slices_of_heads
    from tvlens.geometry.neurons import rows_of_neurons
    from tvlens.selection import parse_selection
    from tvlens.weights.delta import Dense, masked
    from tvlens.weights.slices import chosen

    layout = layouts[family]
    for part, site in (("W_Q", "L0H1"), ("W_O", "L0H1"), ("W_K", "L0K1"), ("W_in", "L0N7")):
        component = Component("matrix", 0, None, part)
        matrix = torch.randn(layout.shape(component))
        kept = chosen(parse_selection(site), layout)[component]
        alone = masked(Dense(matrix), kept.axis, kept.entries).dense()
        if part == "W_in":
            cut, index = (lambda m: rows_of_neurons(m, "W_in")), 7
        else:
            n = layout.n_kv_heads if part == "W_K" else layout.n_heads
            cut, index = (lambda m, n=n, part=part: slices_of_heads(m, part, n)), 1
        assert torch.equal(cut(alone)[index], cut(matrix)[index])
        assert alone.count_nonzero() == cut(matrix)[index].numel()
