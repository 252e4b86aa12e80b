"""The selection language: what it accepts, and that it says where it stumbles."""

import pytest

from tvlens.errors import SelectionError
from tvlens.selection import KEY_TYPES, parse_selection

ROW = {
    "component": "L3H7.W_O",
    "site": "L3H7",
    "kind": "head",
    "layer": 3,
    "index": 7,
    "kv_index": 2,
    "expert": None,
    "rank": None,
    "part": "W_O",
    "base": "b",
    "tuned": "t",
    "tied": False,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('kind == "head"', True),
        ("kind == 'head' and layer in (3, 4) and not index == 6", True),
        ('kind == "head" and (layer < 3 or index >= 8)', False),
        ("2 <= layer < 4", True),
        ("3 < layer <= 4", False),
        ("index != 7", False),
        ("index not in [6, 7]", False),
        ('part in {"W_Q", "W_O"}', True),
        ("expert is None", True),
        ("expert != None", False),
        ("expert < 3", False),
        ("not expert < 3", True),
        ("layer == index or kv_index < layer", True),
        ("tied", False),
        ("not tied", True),
        ("tied == False", True),
        ("layer > -1", True),
        ("L3H7", True),
        ("L3H7, L5N120", True),
        ("L3H7 ,L5N120,", True),
        ("L3H7.W_O", True),
        ("L3H6,L3H7.W_Q", False),
    ],
)
def test_a_row_is_selected_as_python_would(text: str, expected: bool) -> None:
    assert parse_selection(text).accepts(ROW) is expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('kind == "head" and laier == 3', r"position 20: there is no column 'laier'; did you mean"),
        ("kind == 'heads'", r"position 9: there is no kind 'heads'; kinds are head, kv_head"),
        ("layer == '3'", r"position 10: layer holds numbers, got '3'"),
        ("layer in (3, 'x')", r"position 10: layer holds numbers, got 'x'"),
        ("layer == True", r"layer holds numbers, got True"),
        ("kind == 3", r"kind holds text in quotes, got 3"),
        ("kind < 'head'", r"position 1: kind has no order"),
        ("layer < None", r"layer holds numbers, got None"),
        ("layer == kind", r"kind and layer hold values of different types"),
        ("layer == (3, 4)", r"a list can only stand after in"),
        ("layer in 3", r"in needs a column on its left and a list on its right"),
        ("'W' in part", r"in needs a column on its left"),
        ("'é' == 'é' or layer == 1", r"position 1: 'é' is compared with no column"),
        ("part != 'é' and foo == 1", r"position 17: there is no column 'foo'"),
        ("layer % 2 == 0", r"'layer % 2' is neither a column nor a literal"),
        ("abs(layer) == 1", r"'abs\(layer\)' is neither a column nor a literal"),
        ("__import__('os').system('x')", r"is no condition"),
        ("layer", None),
        ("layer and tied", r"position 1: layer alone is neither true nor false"),
        ("layer == 3 if tied else layer == 4", r"is no condition"),
        ("layer in (index, 3)", r"is neither a column nor a literal"),
        ("lambda: 1", r"is no condition"),
        ("layer == 3 and", r"cannot be read: invalid syntax"),
        ("layer = 3", r"cannot be read: .* at position"),
        ("(" * 300 + "layer == 1" + ")" * 300, r"cannot be read|too deeply nested"),
        ("not " * 60_000 + "tied", r"must have 1 to 100000 characters, got"),
        ("not " * 300 + "tied", r"too deeply nested"),
        ("", r"must have 1 to 100000 characters, got 0"),
        ("layer == 1\0", r"cannot be read|too deeply"),
    ],
)
def test_what_is_no_selection_is_refused_with_its_position(text: str, sentence: str | None) -> None:
    if sentence is None:  # a single word is a list of one site
        assert parse_selection(text).names == (text,)
        return
    with pytest.raises(SelectionError, match=sentence):
        parse_selection(text)


def test_a_selection_says_which_columns_and_literals_it_uses() -> None:
    found = parse_selection('kind in ("head", "neuron") and (layer == 3 or site == "L3H7")')
    assert found.columns == {"kind", "layer", "site"}
    assert found.literals("kind") == {"head", "neuron"}
    assert found.literals("site") == {"L3H7"}
    assert found.literals("part") == frozenset()


def test_other_tables_bring_their_own_columns() -> None:
    found = parse_selection("score > 0.5", {**KEY_TYPES, "score": "number"})
    assert found.accepts({**ROW, "score": 0.75})
    with pytest.raises(SelectionError, match="no column 'score'"):
        parse_selection("score > 0.5")
