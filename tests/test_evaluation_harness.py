"""Tasks of lm-eval: its own scores beside ours, on edited models, and what it must not undo."""

import json
from pathlib import Path

import pytest
import torch

from tests.test_weights_vocabulary import WORDS, word_tokenizer
from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.errors import HostError, PromptError
from tvlens.evaluation.suite import Variant, measured, ready, values_of
from tvlens.evaluation.tasks import load_tasks

pytestmark = pytest.mark.slow

YAML = """task: words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ITEMS = 24


def with_an_end(folder: Path) -> None:
    """A tokenizer of words with an end of text, which lm-eval needs."""
    word_tokenizer(folder, WORDS)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": WORDS[-1]}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, and the same questions for lm-eval and for tvlens."""
    root = tmp_path_factory.mktemp("harness")
    base = tiny_llama(root / "base", tie_word_embeddings=True)
    with_an_end(base)
    copy_with(base, root / "tuned", add_noise(scale=0.3))
    tiny_adapter(base, root / "adapter", target_modules=["lm_head"])
    drawn = torch.Generator().manual_seed(0)
    lines = []
    for n in range(ITEMS):
        three, right = torch.randperm(len(WORDS), generator=drawn)[:3].tolist(), n % 3
        choices = [" " + WORDS[t] for t in three]
        prompt = f"w{n} w{(7 * n) % 30} w{n + 3}"
        lines.append({"prompt": prompt, "choices": choices, "answer": right})
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "words.yaml").write_text(YAML.format(data=root / "items.jsonl", cache=root / "cache"))
    (root / "tasks.yaml").write_text(
        "- {name: ours, kind: choice, file: items.jsonl}\n"
        "- {name: theirs, kind: lm_eval, file: words.yaml}\n"
        "- {name: few, kind: lm_eval, file: words.yaml, limit: 5}\n"
    )
    return root


def editable_of(folder: Path, tuned: str):
    from tvlens.compose.edits import EditableModel
    from tvlens.weights.matching import load_pair

    return EditableModel.of_pair(load_pair(folder / "base", folder / tuned))


@pytest.fixture(scope="module")
def editable(folder: Path):
    return editable_of(folder, "tuned")


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_lm_eval_and_tvlens_score_the_same_choices_alike(folder, editable, scale: float) -> None:
    from tvlens.compose.edits import scaled

    tasks = ready(load_tasks(folder / "tasks.yaml"), editable.tokenizer, chat="off")
    with editable.edited(scaled(scale)) as lens:
        found = measured(Variant("m"), lens, tasks).items
    for name in ("acc", "acc_norm"):
        ours, theirs = (values_of(found[task], name) for task in ("ours", "theirs"))
        assert theirs.items.tolist() == ours.items.tolist() == [*range(ITEMS)]
        assert theirs.values.tolist() == ours.values.tolist()
    assert 0 < values_of(found["ours"], "acc").values.mean() < 1
    few = values_of(found["few"], "acc")
    assert few.values.tolist() == values_of(found["theirs"], "acc").values[:5].tolist()


def test_an_edit_changes_what_lm_eval_says_and_parted_embeddings_stay_parted(folder) -> None:
    from tvlens.compose.edits import scaled

    editable = editable_of(folder, "adapter")  # changes the unembedding alone
    tasks = ready(load_tasks(folder / "tasks.yaml"), editable.tokenizer, chat="off")[:2]
    model = editable.lens.model.original_model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with editable.edited(scaled(-40.0)) as lens:
        found = measured(Variant("m"), lens, tasks).items
    ours, theirs = (values_of(found[task], "acc").values.tolist() for task in ("ours", "theirs"))
    assert theirs == ours
    plain = measured(Variant("m"), editable.lens, tasks[:1]).items["ours"]
    assert values_of(plain, "acc").values.tolist() != ours
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "tie_weights" not in vars(model)


def test_a_model_behind_gates_is_refused_with_the_reason(folder, editable) -> None:
    from tvlens.compose.edits import scaled

    task = ready(load_tasks(folder / "tasks.yaml"), editable.tokenizer, chat="off")[1]
    with (
        editable.edited(scaled(0.5), by="gates") as lens,
        pytest.raises(HostError, match="edit in"),
    ):
        list(task.items(lens))


@pytest.mark.parametrize(
    ("entry", "text", "said"),
    [
        ("split: judge", "task: words", "no splits"),
        ("limit: 2", "dataset_path: json", "no 'task'"),
        ("limit: 2", "task: [", "not YAML"),
        ("metric: chrf", "task: words", "no metric 'chrf'"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_before_a_model_is_loaded(
    tmp_path: Path, entry: str, text: str, said: str
) -> None:
    (tmp_path / "words.yaml").write_text(text)
    (tmp_path / "t.yaml").write_text(f"- {{name: x, kind: lm_eval, file: words.yaml, {entry}}}\n")
    with pytest.raises(PromptError, match=said):
        load_tasks(tmp_path / "t.yaml")


def test_a_task_that_lm_eval_cannot_run_gives_a_sentence(folder, editable, tmp_path: Path) -> None:
    text = YAML.format(data=tmp_path / "none.jsonl", cache=tmp_path / "cache")
    (tmp_path / "words.yaml").write_text(text)
    (tmp_path / "t.yaml").write_text("- {name: x, kind: lm_eval, file: words.yaml}\n")
    (task,) = ready(load_tasks(tmp_path / "t.yaml"), editable.tokenizer, chat="off")
    with pytest.raises(PromptError, match=r"lm-eval cannot run words\.yaml"):
        list(task.items(editable.lens))


def test_a_task_without_the_measure_that_is_asked_for_is_refused(folder, editable) -> None:
    text = "- {name: x, kind: lm_eval, file: words.yaml, metric: exact_match}\n"
    (folder / "other.yaml").write_text(text)
    (task,) = ready(load_tasks(folder / "other.yaml"), editable.tokenizer, chat="off")
    with pytest.raises(PromptError, match="no 'exact_match' here; it has acc, acc_norm"):
        list(task.items(editable.lens))


FILTERED = """output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - metric: exact_match
filter_list:
  - name: as-written
    filter: [{function: take_first}]
  - name: never
    filter: [{function: regex, regex_pattern: "zzz(.)"}, {function: take_first}]
"""


@pytest.fixture(scope="module")
def filtered(folder: Path) -> Path:
    """A task whose answers lm-eval reads in two ways."""
    head = YAML.format(data=folder / "items.jsonl", cache=folder / "cache")
    kept = head.split("output_type")[0].replace("task: words", "task: read twice")
    (folder / "twice.yaml").write_text(kept + FILTERED)
    return folder / "twice.yaml"


def _filtered(folder: Path, tokenizer, option: str):
    text = f"- {{name: x, kind: lm_eval, file: twice.yaml, metric: exact_match, limit: 6{option}}}"
    (folder / "twice_tasks.yaml").write_text(text)
    (task,) = ready(load_tasks(folder / "twice_tasks.yaml"), tokenizer, chat="off")
    return task


def test_of_two_filters_the_one_that_is_named_counts(folder, editable, filtered) -> None:
    answers = {}
    for option in ("", ", filter: as-written", ", filter: never"):
        task = _filtered(folder, editable.tokenizer, option)
        items = [one for one in task.items(editable.lens) if one.measure == "exact_match"]
        assert [one.item for one in items] == [*range(6)]
        answers[option] = [one.response for one in items]
        said = "it has the filters as-written, never: the first counts"
        assert bool(task.warnings) == (option == "")
        assert all(said in text for text in task.warnings)
    assert answers[""] == answers[", filter: as-written"]
    assert set(answers[", filter: never"]) == {"[invalid]"}
    assert "[invalid]" not in answers[""]


def test_a_filter_that_is_not_there_is_refused(folder, editable, filtered) -> None:
    with pytest.raises(PromptError, match="no filter 'no'; it has as-written, never"):
        _filtered(folder, editable.tokenizer, ", filter: 'no'")
    content = filtered.read_text()
    (folder / "twice.yaml").write_text("task: read again\ninclude: hidden.yaml\n")
    (folder / "hidden.yaml").write_text(content)
    try:
        task = _filtered(folder, editable.tokenizer, ", filter: 'no'")
        with pytest.raises(PromptError, match="no filter 'no'; it has as-written, never"):
            list(task.items(editable.lens))
    finally:
        filtered.write_text(content)


def test_only_tasks_of_lm_eval_have_filters(tmp_path: Path) -> None:
    text = "- {name: x, kind: loss, file: 'demo:med', filter: never}\n"
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(PromptError, match="only tasks of kind lm_eval have a filter"):
        load_tasks(tmp_path / "t.yaml")


def test_a_tokenizer_without_an_end_is_refused_with_the_reason(
    folder, editable, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    word_tokenizer(tmp_path, WORDS)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    task = ready(load_tasks(folder / "tasks.yaml"), bare, chat="off")[1]
    with pytest.raises(HostError, match="end of text"):
        list(task.items(editable.lens))
