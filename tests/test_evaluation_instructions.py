"""Constraints: what follows each, what breaks each, and how judgements add up."""

import json

import pytest

from tvlens.errors import PromptError
from tvlens.evaluation.instructions import (
    CHECKERS,
    constraint,
    follows,
    follows_loosely,
    judged,
    loose_readings,
)

CASES = [
    ("keywords:existence", {"keywords": ["Flour", "oven"]}, "flour in an Oven", "flour alone"),
    (
        "keywords:frequency",
        {"keyword": "red", "frequency": 2, "relation": "at least"},
        "Red red",
        "red",
    ),
    (
        "keywords:frequency",
        {"keyword": "red", "frequency": 2, "relation": "less than"},
        "red",
        "red red",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["plant"]}, "plantation", "A Plant grows"),
    (
        "keywords:letter_frequency",
        {"letter": "r", "let_frequency": 3, "let_relation": "at least"},
        "Rare r",
        "rr",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "One. Two!",
        "One, two.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "It is 3.5 m.",
        "A. B.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "a\n***\nb",
        "a\n***\nb\n***\nc",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        "one, two three",
        "one two",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "one two",
        "one two three",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "later"},
        'A.\n\n"Later, we went.',
        "Later.\n\nThen.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi\np.s. bye", "Hi, bye"),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "Hi\nP.P.S. bye",
        "Hi\nP.S. bye",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and **b**",
        "**a** and **",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<Snow>>\nIt falls.", "Snow\nIt falls."),
    ("combination:two_responses", {}, "Sea Fox\n******\nGull", "Gull\n******\nGull"),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Which sea?"},
        "which sea? The big one.",
        "The big one.",
    ),
    ("startend:end_checker", {"end_phrase": "Stay safe."}, "Look. Stay safe.", "Stay safe. Look."),
    ("startend:quotation", {}, '"All of it."', '"All of it.'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "GO HOME now",
        "GO now",
    ),
    ("change_case:english_capital", {}, "BLUE, 100 %", "Blue"),
    ("change_case:english_lowercase", {}, "grass.", "Grass."),
    ("punctuation:no_comma", {}, "rice and beans", "rice, beans"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"), CASES, ids=lambda case: str(case)[:40]
)
def test_a_constraint_holds_where_it_is_followed_and_scores_0_where_it_is_violated(
    name, arguments, good, bad
):
    asked = constraint(name, arguments)
    assert follows(good, asked)
    scores = {item.measure: item.value for item in judged(0, bad, [asked])}
    assert scores["instruction_strict"] == 0.0
    assert scores["prompt_strict"] == 0.0
    assert not follows("", asked)


def test_every_constraint_has_a_case_and_a_shipped_prompt():
    from tvlens.evaluation.tasks import INSTRUCTIONS

    assert {case[0] for case in CASES} == set(CHECKERS)
    assert len(CHECKERS) == 24
    shipped = [json.loads(line) for line in INSTRUCTIONS.read_text("utf-8").splitlines()]
    assert {name for entry in shipped for name in entry["instruction_id_list"]} == set(CHECKERS)
    for entry in shipped:
        for name, arguments in zip(entry["instruction_id_list"], entry["kwargs"], strict=True):
            constraint(name, arguments)


def test_a_loose_reading_forgives_a_preamble_a_farewell_and_asterisks():
    assert loose_readings("a\nb\nc")[1:4] == ["b\nc", "a\nb", "b"]
    small = constraint("change_case:english_lowercase", {})
    assert not follows("Sure:\ngrass", small)
    assert follows_loosely("Sure:\ngrass", small)
    assert follows_loosely("Sure:\ngrass\nBye", small)
    assert not follows_loosely("Grass", small)
    quoted = constraint("startend:quotation", {})
    assert not follows('**"yes"**', quoted)
    assert follows_loosely('**"yes"**', quoted)


def test_judgements_add_up_by_constraint_and_by_prompt():
    """Three prompts with 1, 2 and 2 constraints; by hand: strict 2 of 5 and 0 of 3."""
    from tvlens.evaluation.intervals import interval
    from tvlens.evaluation.suite import values_of

    no_comma = constraint("punctuation:no_comma", {})
    small = constraint("change_case:english_lowercase", {})
    responses = [
        ("a, b", [no_comma]),  # 0
        ("Sure.\nabc", [no_comma, small]),  # strict 1 and 0, loose 1 and 1
        ("Yes it is", [no_comma, small]),  # 1 and 0
    ]
    items = [item for i, (text, asked) in enumerate(responses) for item in judged(i, text, asked)]
    means = {
        name: interval(values_of(items, name)).value
        for name in ("instruction_strict", "instruction_loose", "prompt_strict", "prompt_loose")
    }
    assert means == pytest.approx(
        {
            "instruction_strict": 2 / 5,
            "instruction_loose": 3 / 5,
            "prompt_strict": 0.0,
            "prompt_loose": 1 / 3,
        }
    )
    assert [item.detail for item in items if item.measure == "instruction_loose"] == [
        no_comma.name, no_comma.name, small.name, no_comma.name, small.name,
    ]  # fmt: skip


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(PromptError, match="no constraint 'language:response_language'"):
        constraint("language:response_language", {"language": "en"})
    with pytest.raises(PromptError, match="needs 'num_words'"):
        constraint("length_constraints:number_words", {"num_words": None})
    with pytest.raises(PromptError, match="expected 'at least' or 'less than'"):
        constraint("length_constraints:number_words", {"num_words": 3, "relation": "more"})
