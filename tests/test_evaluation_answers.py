"""What a written answer says."""

import pytest

from tvlens.evaluation.answers import chosen, is_exact, is_strict, last_number, with_options


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 * 4 = 8. Paul has 8 books.", 8.0),
        ("It is 1,234.50 in all.", 1234.5),
        ("It fell to -3.", -3.0),
        ("9-4", 4.0),
        ("5 - 7 = -2", -2.0),
        ("first 12 #### 7 and then 30", 7.0),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_an_answer_is_exact_by_its_number_and_strict_by_its_words():
    assert is_exact("I think that 2 * 4 = 8", " 8.")
    assert not is_exact("2 * 4 = 9", " 8.")
    assert not is_exact("no idea", " 8.")
    assert is_exact("A salve.\nMore.", " a  salve.")
    assert not is_strict("I think that 2 * 4 = 8", " 8.")
    assert is_strict("\n 8. \nmore", " 8.")


CHOICES = (" Anaemia.", " A broken arm.", " Asthma.")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        ("(C) because", 2),
        ("B. A broken arm.", 1),
        ("a broken arm. It hurts", 1),
        ("The answer is C", 2),
        ("Answer: (B)", 1),
        ("A broken leg", None),
        ("D", None),
        ("", None),
    ],
)
def test_the_choice_that_is_named(text, place):
    assert chosen(text, CHOICES) == place


def test_options_are_listed_by_letter_and_the_answer_asked_for_after_them():
    asked = with_options("Q: What is it?\nA:", CHOICES)
    assert asked == "Q: What is it?\nA. Anaemia.\nB. A broken arm.\nC. Asthma.\nAnswer:"
