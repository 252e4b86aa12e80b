"""Every kind of task on models whose probabilities are known, and their tables."""

import json
import math
import re

import numpy as np
import pytest
import torch

from tvlens.evaluation.suite import (
    Variant,
    evaluation_tables,
    measured,
    ready,
    values_of,
    with_reference,
)
from tvlens.evaluation.tasks import load_tasks

WORDS = ["<end>", "Q", "yes", "no", "maybe", "7", "8", "A", "B", "is", "it", "said", "a"]
LONGEST_FIRST = re.compile("|".join(sorted(WORDS, key=len, reverse=True)))


class Tokenizer:
    """Words by number; nothing before or after a text."""

    eos_token_id, pad_token_id, chat_template = 0, 0, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [WORDS.index(word) for word in LONGEST_FIRST.findall(text)]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(WORDS[i] for i in ids if i or not skip_special_tokens)

    def convert_ids_to_tokens(self, ids):
        return [WORDS[i] for i in ids]


class Fixed:
    """A model whose next word depends on the last word alone."""

    def __init__(self, after=None, **chances):
        self.table = torch.full((len(WORDS), len(WORDS)), 0.01)
        for word, chance in chances.items():
            self.table[:, WORDS.index(word)] = chance
        for first, second in (after or {}).items():
            self.table[WORDS.index(first), WORDS.index(second)] = 10.0
        self.table /= self.table.sum(1, keepdim=True)

    def p(self, first, second):
        return float(self.table[WORDS.index(first), WORDS.index(second)])

    def logits_at(self, ids, mask, positions):
        return self.table.log()[ids.gather(1, positions)]


def tasks_of(tmp_path, kind, lines, **more):
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    entry = {"name": "task", "kind": kind, "file": "items.jsonl", **more}
    (tmp_path / "tasks.yaml").write_text(json.dumps([entry]))
    return load_tasks(tmp_path / "tasks.yaml")


def rows(tasks, lens, **references):
    prepared = ready(tasks, Tokenizer())
    for name, other in references.items():
        prepared = with_reference(prepared, name, other)
    return measured(Variant("m"), lens, prepared).items["task"]


def mean(items, name):
    values = values_of(items, name)
    return float(np.average(values.values, weights=values.weights))


TEXTS = [
    {"prompt": "Q", "answer": "yes no"},
    {"prompt": "Q is it", "answer": "7"},
    {"prompt": "it", "answer": "maybe said yes"},
]


def test_losses_perplexity_and_bits_of_texts(tmp_path):
    model = Fixed(yes=0.5, no=0.2)
    items = rows(tasks_of(tmp_path, "loss", TEXTS), model)
    nats = [
        -math.log(model.p("Q", "yes") * model.p("yes", "no")),
        -math.log(model.p("it", "7")),
        -math.log(model.p("it", "maybe") * model.p("maybe", "said") * model.p("said", "yes")),
    ]
    counts, sizes = [2, 1, 3], [6, 1, 14]
    assert mean(items, "loss") == pytest.approx(
        np.mean([n / c for n, c in zip(nats, counts, strict=True)]), rel=1e-5
    )
    assert mean(items, "perplexity") == pytest.approx(sum(nats) / 6, rel=1e-5)
    assert mean(items, "bits_per_byte") == pytest.approx(
        sum(nats) / math.log(2) / sum(sizes), rel=1e-5
    )
    assert [i.item for i in sorted(items, key=lambda i: i.item)] == [0] * 3 + [1] * 3 + [2] * 3


def test_the_table_takes_exp_of_the_mean_for_a_perplexity(tmp_path):
    tasks = tasks_of(tmp_path, "loss", TEXTS)
    found = measured(Variant("m"), Fixed(), ready(tasks, Tokenizer()))
    evaluation, items = evaluation_tables([found], tasks)
    frame = evaluation.to_frame().set_index("measure")
    uniform = len(WORDS)
    assert frame.loc["perplexity", "value"] == pytest.approx(uniform, rel=1e-5)
    assert frame.loc["loss", "value"] == pytest.approx(math.log(uniform), rel=1e-5)
    assert frame["primary"].tolist() == [True, False, False]
    assert len(items) == 9


def test_distances_to_base_and_tuned(tmp_path):
    mine, base, tuned = Fixed(yes=0.5), Fixed(yes=0.5, no=0.3), Fixed(no=0.9)
    items = rows(tasks_of(tmp_path, "kl", TEXTS), mine, base=base, tuned=tuned)
    p, q, r = base.table[1], mine.table[1], tuned.table[1]
    assert mean(items, "kl_to_base") == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert mean(items, "kl_to_tuned") == pytest.approx(float((r * (r / q).log()).sum()), rel=1e-4)
    assert mean(items, "agree_base") == 1.0
    assert mean(items, "agree_tuned") == 0.0


def test_agreement_is_a_share_of_tokens(tmp_path):
    mine, base = Fixed(after={"Q": "yes", "yes": "no"}), Fixed(after={"Q": "yes", "yes": "it"})
    items = rows(tasks_of(tmp_path, "kl", TEXTS[:1]), mine, base=base)
    assert mean(items, "agree_base") == 0.5


def test_a_reference_that_is_too_large_is_refused(tmp_path, monkeypatch):
    import tvlens.evaluation.likelihood as likelihood
    from tvlens.errors import BudgetError

    monkeypatch.setattr(likelihood, "BYTES", 100)
    with pytest.raises(BudgetError, match=r"task: the logits of base .*limit"):
        rows(tasks_of(tmp_path, "kl", TEXTS), Fixed(), base=Fixed())


QUESTIONS = [
    {"prompt": "Q", "choices": ["yes", "maybe yes"], "answer": 1},
    {"prompt": "Q is", "choices": ["no", "7", "8"], "answer": 0},
]


def test_choices_by_likelihood(tmp_path):
    model = Fixed(yes=0.5, maybe=0.3)
    items = rows(tasks_of(tmp_path, "choice", QUESTIONS), model)
    short = math.log(model.p("Q", "yes"))
    long = math.log(model.p("Q", "maybe") * model.p("maybe", "yes"))
    assert short > long
    assert long / 9 > short / 3  # the longer choice wins by byte
    assert [values_of(items, name).values.tolist()[0] for name in ("acc", "acc_norm")] == [0, 1]
    found = values_of(items, "choice_logprob").values
    assert found[0] == pytest.approx(long - math.log(math.exp(short) + math.exp(long)), rel=1e-5)
    assert found[1] == pytest.approx(-math.log(3), rel=1e-5)


def test_choices_by_writing_are_apart_from_likelihood(tmp_path):
    tasks = tasks_of(tmp_path, "choice_generated", QUESTIONS, max_new_tokens=2)

    class Lettered(Tokenizer):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, WORDS.index("said")]}

    def said(lens):
        prepared = ready(tasks, Lettered())
        return measured(Variant("m"), lens, prepared).items["task"]

    by_letter = said(Fixed(after={"said": "B", "B": "<end>"}))
    assert values_of(by_letter, "said").values.tolist() == [1, 0]
    assert mean(by_letter, "valid") == 1.0
    babble = said(Fixed(after={"said": "it", "it": "is"}))
    assert mean(babble, "valid") == mean(babble, "said") == 0.0
    assert {i.response for i in babble if i.response is not None} == {"it is"}


def test_worked_answers(tmp_path):
    lines = [{"prompt": "Q it", "answer": "7"}, {"prompt": "Q is", "answer": "8"}]
    model = Fixed(after={"it": "said", "said": "7", "7": "<end>", "is": "8", "8": "<end>"})
    items = rows(tasks_of(tmp_path, "exact", lines, max_new_tokens=4), model)
    assert values_of(items, "exact").values.tolist() == [1, 1]
    assert values_of(items, "strict").values.tolist() == [0, 1]
    cut = rows(tasks_of(tmp_path, "exact", lines, max_new_tokens=4, until=["7"]), model)
    assert values_of(cut, "exact").values.tolist() == [0, 1]


def test_quality_of_what_is_written(tmp_path):
    lines = [{"prompt": "it"}, {"prompt": "Q"}]
    model = Fixed(after={"it": "it", "Q": "yes", "yes": "<end>"})
    items = rows(tasks_of(tmp_path, "generation", lines, max_new_tokens=6), model)
    assert values_of(items, "length").values.tolist() == [6, 1]
    assert values_of(items, "ended").values.tolist() == [0, 1]
    assert values_of(items, "loop").values.tolist() == [1, 0]
    assert values_of(items, "rep_4").values.tolist() == [pytest.approx(2 / 3)]  # one of two texts


def test_models_are_compared_item_by_item(tmp_path):
    tasks = tasks_of(tmp_path, "loss", TEXTS)
    prepared = ready(tasks, Tokenizer())
    found = [
        measured(Variant("a"), Fixed(), prepared),
        measured(Variant("b", "tuning", None, 0.5), Fixed(yes=0.5), prepared),
    ]
    evaluation, items = evaluation_tables(found, tasks, against="a")
    frame = evaluation.to_frame().set_index(["model", "measure"])
    first, second = frame.loc["a"], frame.loc["b"]
    assert first["difference"].isna().all()
    assert second["difference"].to_numpy() == pytest.approx(
        (second["value"] - first["value"]).to_numpy()
    )
    assert second.loc["loss", "test"] == "paired_bootstrap"
    assert second["scale"].tolist() == [0.5] * 3
    assert items.to_frame()["control"].dropna().unique().tolist() == ["tuning"]


def test_without_a_tokenizer_nothing_can_be_measured(tmp_path):
    from tvlens.errors import HostError

    with pytest.raises(HostError, match="tokenizer"):
        ready(tasks_of(tmp_path, "loss", TEXTS), None)
