"""Selections by labels, scores and sizes of tables, against lists written by hand."""

import pytest
import torch

from . import attribution_pairs as pairs
from .test_compose_edits import noised

LABELS = {
    ("matrix", 0, None, "W_O"): "new_write",
    ("matrix", 0, None, "W_Q"): "new_read",
    ("matrix", 1, None, "W_out"): "new_write",
    ("norm", 1, None, "ln2.w"): "amplified",
    ("head", 0, 1, "OV"): "new_write",
    ("head", 0, 2, "QK"): "new_write",
    ("neuron", 1, 5, "W_out"): "new_write",
    ("neuron", 1, 5, "W_in"): "mixed",
    ("neuron", 1, 7, "W_in"): "new_write",
}
SCORES = {
    ("matrix", 0, None, "W_O"): (0.4, 0.6),
    ("matrix", 0, None, "W_Q"): (-0.9, -0.9),
    ("matrix", 1, None, "W_out"): (3.0, -3.0),
    ("norm", 1, None, "ln2.w"): (0.1, 0.1),
    ("head", 0, 0, None): (0.2, 0.2),
    ("head", 0, 1, None): (-0.7, -0.5),
    ("head", 1, 2, None): (0.2, 0.2),
    ("head", 1, 3, None): (0.0, 0.0),
}


def keyed(keys, **columns):
    """A frame's columns for components given by their keys."""
    from tvlens.components import Component, key_columns

    components = [Component(*key) for key in keys]
    count = len(components)
    shared = {"base": ["base"] * count, "tuned": ["tuned"] * count, "tied": [False] * count}
    return {**key_columns(components), **shared, **columns}


def attribution(scores=None, *, method="weight_ig"):
    from tvlens.attribution.tables import ATTRIBUTION_SCHEMA
    from tvlens.tables import Table

    scores = SCORES if scores is None else scores
    keys = [key for key, values in scores.items() for _ in values]
    count = len(keys)
    columns = keyed(
        keys,
        method=[method] * count,
        space=["weight"] * count,
        prompt=[n for values in scores.values() for n in range(len(values))],
        score=[value for values in scores.values() for value in values],
    )
    whole = {name: columns.get(name, [None] * count) for name in ATTRIBUTION_SCHEMA.names}
    return Table.of("attribution", ATTRIBUTION_SCHEMA, whole)


def labels(found=None):
    from tvlens.geometry.classify import LABELS_SCHEMA
    from tvlens.tables import Table

    found = LABELS if found is None else found
    columns = keyed([*found], label=[*found.values()])
    whole = {name: columns.get(name, [None] * len(found)) for name in LABELS_SCHEMA.names}
    return Table.of("labels", LABELS_SCHEMA, whole)


def doses(model, part):
    from tvlens.compose.edits import Edit, Term

    return model.doses(Edit(0.0, (Term(part, 1.0),)))


def chosen(text, **how):
    """What is kept by a selection of the noised pair, with the tables above."""
    from tvlens.compose.selecting import findings, selected

    found = findings("tuned", labels=labels(), attribution=attribution())
    return selected(text, noised().vector.base, found, **how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('label == "new_write"', "L0.W_O,L1.W_out"),
        ('label in ("new_write", "amplified") and layer == 1', "L1.W_out,L1.ln2.w"),
        ('kind == "head" and label == "new_write"', "L0H1.W_O,L0H2.W_Q"),
        ('kind == "neuron" and label == "new_write"', "L1N5.W_out,L1N7.W_in"),
        ('label == "new_write" and score > 0.1', "L0.W_O"),
        ("score < 0", "L0.W_Q"),
        ("score > 0.45 and score < 0.55", "L0.W_O"),
        ('kind == "head" and score < 0', "L0H1"),
        ('kind == "norm" and label != None', "L1.ln2.w"),
    ],
)
def test_a_selection_by_findings_is_the_list_written_by_hand(text, same):
    model = noised()
    wanted, found = doses(model, same), doses(model, chosen(text).kept)
    assert all(torch.equal(found[key], dose) for key, dose in wanted.items())
    assert any(bool(dose.any()) for dose in wanted.values())


def test_not_is_the_complement_also_of_labels():
    """What has no label at all is not new, and belongs to the complement."""
    model = noised()
    new, others = (
        doses(model, chosen(text).kept)
        for text in ('label == "new_write"', 'not label == "new_write"')
    )
    assert all(bool((new[key] + others[key] == 1.0).all()) for key in new)


@pytest.mark.parametrize(
    ("text", "top", "same"),
    [
        ("", 1, "L0.W_Q"),
        ("", 2, "L0.W_Q,L0.W_O"),
        ('kind == "matrix"', 9, "L0.W_Q,L0.W_O"),
        ('kind == "head"', 1, "L0H1"),
        ('kind == "head"', 2, "L0H1,L0H0"),
        ('label == "new_write"', 1, "L0.W_O"),
    ],
)
def test_the_top_are_the_largest_by_mean_score_whatever_its_sign(text, top, same):
    """A mean of zero over prompts (L1.W_out) is not ranked, however large each score is."""
    model = noised()
    wanted, found = doses(model, same), doses(model, chosen(text, top=top).kept)
    assert all(torch.equal(found[key], dose) for key, dose in wanted.items())


def test_ties_and_what_has_no_score_are_said():
    found = chosen('kind == "head"', top=2)
    assert any(
        "1 more have the same |score| as L0H0, the last of the 2; those that come first" in note
        for note in found.notes
    )
    assert any("4 of 8 selected components, such as L0H2, have no" in note for note in found.notes)
    assert found.text == 'the top 2 by |score| of kind == "head"'
    few = chosen('kind == "head"', top=7)
    assert any("only 3 components have a score that is not zero, not 7" in n for n in few.notes)
    assert chosen('kind == "norm" and layer == 1 and part == "ln2.w"', top=1).notes == ()


def test_a_tied_embedding_has_the_score_of_both_its_uses():
    from tvlens.compose.selecting import findings, with_tied

    uses = {
        ("embedding", None, None, part): (value,) for part, value in (("W_E", 2.0), ("W_U", -5.0))
    }
    found = with_tied(findings("tuned", attribution=attribution(uses)))
    assert found.of(pairs.component("embedding", None, None, "W_E"))["score"] == -3.0


@pytest.mark.parametrize(
    ("text", "how", "error", "sentence"),
    [
        ('label == "newwrite"', {}, "SelectionError", "labels nothing 'newwrite'; it has ampli"),
        ("lable == 3", {}, "SelectionError", "did you mean label"),
        ("score == 'high'", {}, "SelectionError", "score holds numbers"),
        ("L0H1,L0H2", {"top": 1}, "SelectionError", "is a choice already"),
        ('kind == "kv_group"', {"top": 1}, "SelectionError", "has a weight_ig score"),
        ("relative_delta > 1", {}, "StudyError", "no table 'weights'.*tvlens decompose"),
        ("label == None and layer == 9", {}, "SelectionError", "selects nothing of this model"),
    ],
)
def test_what_cannot_be_looked_up_is_refused(text, how, error, sentence):
    import tvlens.errors

    with pytest.raises(getattr(tvlens.errors, error), match=sentence):
        chosen(text, **how)


def test_tables_of_another_fine_tune_are_refused():
    from tvlens.compose.selecting import findings
    from tvlens.errors import StudyError

    with pytest.raises(StudyError, match="'labels' of the study says nothing of other"):
        findings("other", labels=labels())
    with pytest.raises(StudyError, match="'attribution' of the study says nothing of tuned"):
        findings("tuned", attribution=attribution(method="exact_weight_path"))


def test_a_resolved_selection_is_a_part_for_vectors_controls_and_merges():
    from tvlens.attribution.partition import partition
    from tvlens.compose.controls import length, random_set, random_vector
    from tvlens.compose.weighting import kept_shares

    model, found = noised(), chosen('kind == "head" and label == "new_write"')
    drawn = random_set(model, found.kept, seed=1)
    parts = partition(model.gated)
    own = length(parts, doses(model, found.kept))
    assert drawn.count == 2
    assert drawn.scale * length(parts, drawn.doses) == pytest.approx(own, rel=1e-6)
    selected, by_list = model.vector.select(found.kept), model.vector.select("L0H1.W_O,L0H2.W_Q")
    assert {*selected} == {*by_list}
    assert all(torch.equal(selected[one].dense(), by_list[one].dense()) for one in by_list)
    assert selected.selection is None
    vector = random_vector(model, seed=1, part=found.kept)
    assert vector.norm() == pytest.approx(own, rel=1e-5)
    shares = kept_shares(found.kept)
    assert {str(one): int(share.factors.sum()) for one, share in shares.items()} == {
        "L0.W_Q": 8,
        "L0.W_O": 8,
    }
