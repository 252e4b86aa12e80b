"""What a plan's words for activations and directions stand for, and what is refused."""

import pytest

from tvlens.attribution.exchanges import (
    USUAL,
    Words,
    chosen_directions,
    chosen_parts,
    exchanges,
    parts_there,
)
from tvlens.attribution.nodes import DEFAULT_PARTS, NODES
from tvlens.errors import HostError, PromptError, StudyError
from tvlens.models import SHIPPED

GATED, PLAIN = parts_there(gated=True), parts_there(gated=False)


def asked(words=USUAL, *, metric="logprob", corrupt=2, there=GATED):
    return exchanges(words, SHIPPED[metric], there=there, prompts=5, corrupt=corrupt)


def test_without_words_the_usual_activations_go_both_ways_and_denoise_where_they_can():
    found, vanishing, said = asked()
    assert [(one.direction, one.at, one.prompts) for one in found] == [
        ("clean_into_corrupt", "tuned", 2),
        ("tuned_into_base", "base", 5),
        ("base_into_tuned", "tuned", 5),
    ]
    assert {one.parts for one in found} == {DEFAULT_PARTS}
    assert vanishing == said == []
    without = asked(corrupt=0)
    assert [one.direction for one in without.found] == ["tuned_into_base", "base_into_tuned"]
    assert without.left_out == []


def test_parts_are_named_default_or_all_that_there_is():
    assert chosen_parts("q, z,q") == ("q", "z")
    assert chosen_parts("default,k") == (*DEFAULT_PARTS, "k")
    assert chosen_parts("all", GATED) == tuple(NODES)
    assert set(NODES) - set(chosen_parts("all", PLAIN)) == {"pre_linear"}


@pytest.mark.parametrize(
    ("text", "said"),
    [("zz", "no activation 'zz'.*resid_post"), (" , ", "names no activation")],
)
def test_parts_that_do_not_exist_are_refused_with_those_that_do(text, said):
    with pytest.raises(StudyError, match=said):
        chosen_parts(text)


def test_a_part_that_the_model_lacks_is_refused():
    with pytest.raises(StudyError, match=r"no activation 'pre_linear'.*gated MLP"):
        chosen_parts("pre_linear", PLAIN)


def test_directions_name_the_model_that_runs():
    assert chosen_directions(
        ["clean_into_corrupt@base", "zero_ablation", "mean_ablation@tuned"]
    ) == [("clean_into_corrupt", "base"), ("zero_ablation", "tuned"), ("mean_ablation", "tuned")]
    every = chosen_directions(["all", "clean_into_corrupt", "corrupt_into_clean@base"])
    assert len(every) == len(set(every)) == 7
    with pytest.raises(HostError, match="cannot be taken at 'tuned'"):
        chosen_directions(["tuned_into_base@tuned"])
    with pytest.raises(HostError, match="cannot be taken at 'nowhere'"):
        chosen_directions(["zero_ablation@nowhere"])
    with pytest.raises(StudyError, match=r"no direction 'noising'.*corrupt_into_clean.*all"):
        chosen_directions(["noising"])


def test_what_is_named_and_cannot_be_asked_is_refused_and_what_all_leaves_out_is_said():
    with pytest.raises(PromptError, match="corrupt_into_clean needs prompts with 'corrupt'"):
        asked(Words(directions=("corrupt_into_clean",)), corrupt=0)
    with pytest.raises(PromptError, match="clean_into_corrupt needs"):
        asked(Words(directions=("default", "clean_into_corrupt")), corrupt=0)
    found, _, said = asked(Words(directions=("all",)), corrupt=0)
    assert [one.direction for one in found] == [
        "tuned_into_base", "base_into_tuned", "zero_ablation", "mean_ablation",
    ]  # fmt: skip
    assert [sentence.split()[0] for sentence in said] == [
        "clean_into_corrupt",
        "corrupt_into_clean",
    ]


def test_a_direction_whose_gradient_vanishes_is_left_out_unless_it_is_named():
    found, vanishing, said = asked(metric="kl_to_base")
    assert [one.direction for one in found] == ["clean_into_corrupt", "base_into_tuned"]
    assert (vanishing, said) == (["tuned into base"], [])
    every = asked(Words(directions=("all", "zero_ablation@base")), metric="kl_to_tuned")
    assert every.vanishing == [
        "base into tuned",
        "corrupt into clean, in the tuned model",
        "zero ablation, in the tuned model",
        "mean ablation, in the tuned model",
    ]
    named = asked(Words(directions=("tuned_into_base",)), metric="kl_to_base")
    assert len(named.found) == 1


def test_other_estimators_have_usual_activations_of_their_own():
    found = asked(Words(estimators=("qk_fix",))).found
    assert set(found[0].parts) == {*DEFAULT_PARTS, "q", "k"}


def test_patterns_have_no_mean():
    words = Words("z,pattern", ("mean_ablation", "zero_ablation"))
    (mean, zero), _, said = asked(words)
    assert (mean.parts, zero.parts) == (("z",), ("z", "pattern"))
    assert len(said) == 1
    assert "no mean" in said[0]
    with pytest.raises(StudyError, match=r"no mean.*zero_ablation"):
        asked(Words("pattern", ("mean_ablation",)))


def test_a_direction_is_said_with_its_model_where_there_is_a_choice():
    found = asked(Words(directions=("tuned_into_base", "zero_ablation@base"))).found
    assert [one.words for one in found] == ["tuned into base", "zero ablation, in the base model"]
