"""Variety, loops and likeness of texts, counted by hand."""

import pytest

from tvlens.evaluation.texts import distinct, likeness, loops, missing_packages, quality


def test_different_runs_of_words_over_all():
    assert distinct("the cat saw The dog", 1) == pytest.approx(4 / 5)
    assert distinct("a b a b", 2) == pytest.approx(2 / 3)  # ab, ba, ab
    assert distinct("one two three", 4) is None


def test_a_loop_is_what_is_said_three_times_at_the_end():
    assert loops([5, 1, 2, 1, 2, 1, 2])
    assert loops([7, 7, 7])
    assert not loops([1, 2, 1, 2, 1])
    assert not loops([1, 2, 1, 2, 1, 2, 9])
    assert not loops([])


def test_quality_of_a_text():
    found = dict(quality("a b c d a b c d", list(range(8)), ended=True))
    assert found == pytest.approx(
        {
            "distinct_1": 0.5,
            "distinct_2": 4 / 7,
            "rep_4": 0.2,
            "loop": 0.0,
            "length": 8.0,
            "ended": 1.0,
        }
    )
    assert set(dict(quality("", [], ended=False))) == {"loop", "length", "ended"}


@pytest.mark.slow
def test_likeness_to_a_reference_is_that_of_its_packages():
    same = dict(likeness("the heart pumps blood", "the heart pumps blood"))
    assert same["chrf"] == pytest.approx(100.0)
    assert same["rouge_l"] == pytest.approx(1.0)
    part = dict(likeness("the heart", "the heart pumps blood"))
    assert part["rouge_l"] == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert 0 < part["chrf"] < 100


def test_what_is_not_installed_is_named(monkeypatch):
    import tvlens.evaluation.texts as texts

    monkeypatch.setattr(texts, "find_spec", lambda package: None)
    assert missing_packages() == {"chrf": "sacrebleu", "rouge_l": "rouge_score"}
    assert dict(likeness("a", "a")) == {}
