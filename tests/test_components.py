"""The key: labels, sites and columns."""

import pytest

from tvlens.components import DISJOINT_KINDS, KINDS, Component, key_columns


@pytest.mark.parametrize(
    ("component", "label", "site"),
    [
        (Component("head", 3, 7, "W_O"), "L3H7.W_O", "L3H7"),
        (Component("head", 3, 7, "OV"), "L3H7.OV", "L3H7"),
        (Component("head", 3, 7), "L3H7", "L3H7"),
        (Component("kv_head", 3, 2, "W_V"), "L3K2.W_V", "L3K2"),
        (Component("kv_group", 3, 2), "L3G2", "L3G2"),
        (Component("neuron", 3, 120, "W_out"), "L3N120.W_out", "L3N120"),
        (Component("matrix", 3, None, "W_in"), "L3.W_in", "L3.mlp"),
        (Component("matrix", 0, None, "W_Q"), "L0.W_Q", "L0.attn"),
        (Component("norm", 3, None, "ln2.w"), "L3.ln2.w", "L3.ln2"),
        (Component("norm", None, None, "ln_final.w"), "ln_final.w", "ln_final"),
        (Component("bias", 3, None, "b_O"), "L3.b_O", "L3.attn"),
        (Component("bias", 3, None, "b_in"), "L3.b_in", "L3.mlp"),
        (Component("bias", 3, None, "ln1.b"), "L3.ln1.b", "L3.ln1"),
        (Component("embedding", None, None, "W_E"), "embed.W_E", "embed"),
        (Component("embedding", None, None, "W_U"), "unembed.W_U", "unembed"),
        (Component("embedding", None, None, "W_pos"), "pos_embed.W_pos", "pos_embed"),
        (Component("node", 3, None, "mlp_out"), "L3.mlp_out", "L3.mlp"),
        (Component("node", 3, None, "attn_out"), "L3.attn_out", "L3.attn"),
        (Component("node", 3, None, "resid_post"), "L3.resid_post", "L3.resid_post"),
    ],
)
def test_labels_and_sites_are_those_of_the_contract(
    component: Component, label: str, site: str
) -> None:
    assert (str(component), component.site) == (label, site)


def test_key_columns_hold_the_numbers_and_not_only_the_label() -> None:
    columns = key_columns([Component("head", 3, 7, "W_O")], kv_index=[3])
    assert columns["layer"] == [3]
    assert columns["index"] == [7]
    assert columns["kv_index"] == [3]
    assert columns["part"] == ["W_O"]


def test_the_disjoint_kinds_are_kinds() -> None:
    assert set(DISJOINT_KINDS) < set(KINDS)


def test_columns_of_pieces_are_the_key_columns_of_their_components() -> None:
    from tvlens.components import Component, Pieces, columns_of_pieces, key_columns

    for kind, part in (("head", "OV"), ("kv_head", "W_V"), ("neuron", "W_out")):
        for layer in (None, 3):
            components = [Component(kind, layer, index, part) for index in range(4)]
            kv = [0, 0, 1, 1]
            found = columns_of_pieces(Pieces(kind, layer, part, 4), kv_index=kv)
            assert found == key_columns(components, kv_index=[*kv])
            assert list(found) == list(key_columns(components))
    assert columns_of_pieces(Pieces("neuron", 0, "W_in", 1))["kv_index"] == [None]
