"""Verdicts by the rules of docs/claims.md, on gains that are known."""

import pytest

from tvlens.evaluation.measures import MEASURES
from tvlens.study.claims import CANNOT_TELL, NOT_SUPPORTED, SUPPORTED, Gain, judged

LOSS = MEASURES["loss"]  # smallest: 0.05


@pytest.mark.parametrize(
    ("gains", "verdict", "why"),
    [
        ([(0.5, 0.4, 0.6), (0.3, 0.1, 0.5)], SUPPORTED, "better than the base"),
        ([(0.5, 0.4, 0.6), (0.01, -0.01, 0.03)], NOT_SUPPORTED, "0.05 better than other 1"),
        ([(-0.5, -0.6, -0.4), (0.3, 0.1, 0.5)], NOT_SUPPORTED, "0.05 better than base"),
        ([(0.5, 0.4, 0.6), (0.2, -0.1, 0.5)], CANNOT_TELL, "not surely better than other 1"),
        ([(0.03, 0.01, 0.06), (0.3, 0.1, 0.5)], CANNOT_TELL, "better, by less than 0.05"),
        ([(0.5, 0.4, 0.6)], CANNOT_TELL, "nothing was put"),
    ],
)
def test_a_verdict_follows_from_the_intervals(gains, verdict, why):
    names = ["base", *(f"other {i}" for i in range(1, len(gains)))]
    found = judged([Gain(n, *g) for n, g in zip(names, gains, strict=True)], LOSS)
    assert found["verdict"] == verdict
    assert why in found["why"]
    assert (found["value"], found["ci_low"], found["ci_high"]) == gains[0]


def test_the_control_in_the_table_is_the_one_that_leaves_least():
    gains = [Gain("base", 0.5, 0.4, 0.6), Gain("a", 0.4, 0.3, 0.5), Gain("b", 0.2, 0.1, 0.3)]
    found = judged(gains, LOSS)
    assert (found["control"], found["control_value"]) == ("b", 0.2)
    assert found["smallest"] == 0.05


def test_gains_have_the_good_direction_of_their_metric():
    """Losses 1.0 and 2.0 of tuned and base: the tuned model gains 1."""
    import pandas as pd

    from tvlens.study.claims import _gains

    def rows(model, value, control=None, scale=None):
        return [
            {
                "model": model,
                "item": item,
                "value": value + 0.1 * item,
                "weight": 1.0,
                "control": control,
                "scale": scale,
            }
            for item in range(5)
        ]

    items = pd.DataFrame(
        [
            *rows("base", 2.0),
            *rows("med", 1.0),
            *rows("med x 1", 1.0, "tuning", 1.0),
            *rows("random 1 x 1", 1.8, "random", 1.0),
            *rows("random 1 x 0.5", 9.0, "random", 0.5),
        ]
    )
    found = _gains(items, "med", "base", "loss", 0)
    assert [gain.over for gain in found] == ["base", "random 1 x 1"]
    assert [gain.value for gain in found] == pytest.approx([1.0, 0.8])
    assert [gain.low for gain in found] == pytest.approx([1.0, 0.8])
    higher = _gains(items, "med", "base", "acc", 0)
    assert [gain.value for gain in higher] == pytest.approx([-1.0, -0.8])
