"""Task files: what they say, and everything that is wrong with one at once."""

import json

import pytest

from tvlens.errors import PromptError
from tvlens.evaluation.measures import MEASURES
from tvlens.evaluation.tasks import MEASURED, load_tasks


@pytest.fixture
def folder(tmp_path):
    lines = {
        "exam.jsonl": [
            {"prompt": "Q1", "choices": ["a", "b", "c"], "answer": 2, "split": "choose"},
            {"prompt": "Q2", "choices": ["a", "b"], "answer": "B", "split": "judge"},
            {"prompt": "Q3", "choices": [" yes", " no"], "answer": "no", "split": "judge"},
            {"prompt": "Q4", "answer": " right", "wrong": " wrong", "split": "judge"},
        ],
        "sums.jsonl": [{"prompt": "1 + 1", "answer": " 2"}],
        "open.jsonl": [{"prompt": "say"}],
        "rules.jsonl": [
            {
                "prompt": "Say it",
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{}],
            }
        ],
    }
    for name, entries in lines.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, entries)) + "\n")
    (tmp_path / "texts.txt").write_text("One text here.\n\nAnother text there.\n")

    def write(text):
        (tmp_path / "tasks.yaml").write_text(text)
        return tmp_path / "tasks.yaml"

    return write


def test_tasks_are_read_with_their_items(folder):
    path = folder(
        """
- {name: texts, kind: loss, file: texts.txt}
- {name: exam, kind: choice, file: exam.jsonl, metric: acc_norm}
- {name: judged, kind: choice_generated, file: exam.jsonl, split: judge, limit: 2}
- {name: sums, kind: exact, file: sums.jsonl, max_new_tokens: 8, until: ["\\n"]}
- {name: rules, kind: instructions, file: rules.jsonl}
- {name: shipped, kind: instructions, file: "shipped:instructions"}
"""
    )
    tasks = {task.spec.name: task for task in load_tasks(path)}
    assert [len(task.items) for task in tasks.values()] == [2, 4, 2, 1, 1, 30]
    assert [task.spec.primary for task in tasks.values()] == [
        "loss", "acc_norm", "said", "exact", "prompt_strict", "prompt_strict",
    ]  # fmt: skip
    exam = tasks["exam"].items
    assert [q.choices[q.right] for q in exam.values()] == ["c", "b", " no", " right"]
    assert list(tasks["judged"].items) == [1, 2]
    assert all(q.split == "judge" for q in tasks["judged"].items.values())
    assert tasks["sums"].spec.until == ("\n",)


def test_right_answers_are_not_all_in_one_place():
    from tvlens.evaluation.tasks import _two_choices
    from tvlens.models.prompts import Prompt

    places = [_two_choices(Prompt(f"Q{i}", answer=" a", wrong=" b")).right for i in range(100)]
    assert 30 < sum(places) < 70


@pytest.mark.parametrize("name", ["demo:med", "demo:math", "demo:both"])
def test_the_demos_tasks_load(name):
    tasks = load_tasks(name)
    assert len(tasks) == 6
    assert all(task.spec.primary in MEASURED[task.spec.kind] for task in tasks)


def test_everything_wrong_with_a_file_is_named_at_once(folder):
    path = folder(
        """
- {name: a, kind: losses, file: texts.txt}
- {name: b, kind: loss, file: texts.txt, colour: red}
- {kind: loss, file: texts.txt}
"""
    )
    with pytest.raises(PromptError) as caught:
        load_tasks(path)
    text = str(caught.value)
    assert all(part in text for part in ("task 1 kind", "task 2 colour", "task 3 name"))


def test_every_file_that_cannot_be_used_is_named(folder):
    path = folder(
        """
- {name: gone, kind: loss, file: gone.txt}
- {name: open, kind: exact, file: open.jsonl}
- {name: rules, kind: choice, file: rules.jsonl}
- {name: none, kind: exact, file: sums.jsonl, split: choose}
- {name: other, kind: exact, file: sums.jsonl, split: judge}
"""
    )
    with pytest.raises(PromptError) as caught:
        load_tasks(path)
    text = str(caught.value)
    assert all(part in text for part in ("gone:", "open:", "every line needs an 'answer'"))
    assert "line 1: neither 'choices' nor 'answer' and 'wrong'" in text
    assert ("none: " in text) != ("other: " in text)  # one line, of one split


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "no task"),
        (
            "- {name: a, kind: loss, file: texts.txt}\n- {name: a, kind: kl, file: texts.txt}",
            "two tasks",
        ),
        ("- {name: a, kind: loss, file: texts.txt, metric: acc}", "loss has no metric 'acc'"),
        ("name: [", "is not YAML"),
        ("name: a", "valid list"),
    ],
)
def test_a_list_that_is_none_gives_a_sentence(folder, text, sentence):
    with pytest.raises(PromptError, match=sentence):
        load_tasks(folder(text))


@pytest.mark.parametrize("spec", ["demo:law", "nowhere.yaml"])
def test_tasks_that_are_not_there_are_refused(spec):
    with pytest.raises(PromptError, match=r"no tasks|cannot read"):
        load_tasks(spec)


def test_every_measure_of_a_kind_is_described():
    assert {name for names in MEASURED.values() for name in names} == set(MEASURES)
