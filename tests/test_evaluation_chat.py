"""Chat templates in tasks: token ids are those of the tokenizer's own template, or plain ones."""

import json

import pytest

from tests.test_models_prompts import words_tokenizer
from tvlens.errors import PromptError
from tvlens.evaluation.suite import ready
from tvlens.evaluation.tasks import load_tasks

pytestmark = pytest.mark.slow

TURNS = "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
ASKS = "{% if add_generation_prompt %}The assistant is{% endif %}"
TEMPLATES = {"with bos": "{{ bos_token }}" + TURNS + ASKS, "without bos": TURNS + ASKS}
QUESTION = "The capital of France is"
LINES = {
    "loss": [{"prompt": QUESTION, "answer": " Paris"}],
    "kl": [{"prompt": QUESTION, "answer": " Paris"}],
    "choice": [{"prompt": QUESTION, "choices": [" Rome", " Paris"], "answer": 1}],
    "choice_generated": [{"prompt": QUESTION, "choices": [" Rome", " Paris"], "answer": 1}],
    "exact": [{"prompt": QUESTION, "answer": " Paris"}],
    "generation": [{"prompt": QUESTION}],
    "instructions": [
        {"prompt": QUESTION, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    ],
}
WRITTEN = ("choice_generated", "exact", "generation", "instructions")


def chatty(template="with bos", *, bos=True, eos=False):
    """A tokenizer that puts a BOS before a text, and whose template may bring its own."""
    tokenizer = words_tokenizer(bos=bos, eos=eos)
    tokenizer.chat_template = TEMPLATES.get(template)
    return tokenizer


def prepared(folder, kind, tokenizer, chat, lines=None):
    """A task of a kind made ready by the suite, as a sweep makes it."""
    text = "\n".join(map(json.dumps, lines or LINES[kind])) + "\n"
    (folder / "items.jsonl").write_text(text)
    (folder / "tasks.yaml").write_text(f"- {{name: task, kind: {kind}, file: items.jsonl}}\n")
    (found,) = ready(load_tasks(folder / "tasks.yaml"), tokenizer, chat=chat)
    return found


def prompts_of(found):
    """The ids of every prompt of a task, and of what follows each."""
    if hasattr(found, "ids"):
        return [list(row) for row in found.ids], [[] for _ in found.ids]
    prompts, answers = [], []
    for part in found.parts:
        for row in range(len(part)):
            real = part.ids[row][part.mask[row].bool()].tolist()
            length = int(part.prompt_lengths[row])
            prompts.append(real[:length])
            answers.append(real[length:])
    return prompts, answers


def asked(kind):
    """The text that a model is asked."""
    if kind == "choice_generated":
        return f"{QUESTION}\nA. Rome\nB. Paris\nAnswer:"
    return QUESTION


def in_template(tokenizer, text):
    turn = [{"role": "user", "content": text}]
    return list(
        tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


@pytest.mark.parametrize("chat", ["on", "auto"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", LINES)
def test_prompts_are_the_ids_of_the_tokenizers_own_template(tmp_path, kind, template, chat):
    tokenizer = chatty(template, eos=True)
    wanted = in_template(tokenizer, asked(kind))
    prompts, _ = prompts_of(prepared(tmp_path, kind, tokenizer, chat))
    assert prompts == [wanted] * len(prompts)
    assert wanted.count(tokenizer.bos_token_id) == (template == "with bos")
    assert tokenizer.decode(wanted).endswith("<end>The assistant is")


@pytest.mark.parametrize("kind", LINES)
def test_off_is_plain_text_with_the_tokenizers_own_bos_and_no_eos(tmp_path, kind):
    for bos in (True, False):
        tokenizer = chatty(bos=bos, eos=True)
        bare = tokenizer(asked(kind), add_special_tokens=False)["input_ids"]
        prompts, _ = prompts_of(prepared(tmp_path, kind, tokenizer, "off"))
        assert prompts == [[tokenizer.bos_token_id] * bos + list(bare)] * len(prompts)


@pytest.mark.parametrize("kind", LINES)
def test_without_a_template_auto_is_off_and_on_is_refused(tmp_path, kind):
    tokenizer = chatty("none")
    auto, off = (prompts_of(prepared(tmp_path, kind, tokenizer, chat)) for chat in ("auto", "off"))
    assert auto == off
    with pytest.raises(PromptError, match=r"no chat template.*--chat auto or off"):
        prepared(tmp_path, kind, tokenizer, "on")


@pytest.mark.parametrize("chat", ["on", "off"])
@pytest.mark.parametrize("kind", ["loss", "kl", "choice"])
def test_answers_follow_without_special_tokens_and_they_alone_count(tmp_path, kind, chat):
    tokenizer = chatty(eos=True)
    found = prepared(tmp_path, kind, tokenizer, chat)
    _, answers = prompts_of(found)
    texts = [" Rome", " Paris"] if kind == "choice" else [" Paris"]
    wanted = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert sorted(answers) == sorted(wanted)
    counted = [
        part.ids[row][part.scored[row]].tolist() for part in found.parts for row in range(len(part))
    ]
    assert sorted(counted) == sorted(wanted)


@pytest.mark.parametrize("kind", ["loss", "kl"])
def test_documents_are_no_turns_of_a_chat(tmp_path, kind):
    """What has no answer is text to be read, also with the template on; one BOS stands before."""
    tokenizer = chatty()
    prompts, answers = prompts_of(
        prepared(tmp_path, kind, tokenizer, "on", lines=[{"prompt": QUESTION}])
    )
    bare = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    assert prompts == [[tokenizer.bos_token_id, *bare]]
    assert answers == [[]]


def test_bytes_are_those_of_the_answer_whatever_the_template_adds(tmp_path):
    for chat in ("on", "off"):
        found = prepared(tmp_path, "loss", chatty(), chat)
        assert found.sizes == {0: len(b" Paris")}


def test_special_words_of_the_template_are_single_tokens_and_those_of_a_prompt_are_not_added(
    tmp_path,
):
    tokenizer = chatty()
    (ids,), _ = prompts_of(prepared(tmp_path, "generation", tokenizer, "on"))
    names = tokenizer.convert_ids_to_tokens(ids)
    assert names[:2] == ["<s>", "<user>"]
    assert names.count("<user>") == names.count("<end>") == names.count("<s>") == 1


@pytest.mark.parametrize("kind", WRITTEN)
def test_an_answer_in_a_chat_ends_at_the_tokenizers_end(tmp_path, kind):
    """A model that writes the end at once has written nothing, in the template and without."""
    import torch

    from tvlens.evaluation.suite import Variant, measured

    class Silent:
        def __init__(self, end):
            self.end = end

        def logits_at(self, ids, mask, positions):
            logits = torch.zeros(*positions.shape, 300)
            logits[..., self.end] = 9.0
            return logits

    for chat in ("on", "off"):
        tokenizer = chatty()
        found = prepared(tmp_path, kind, tokenizer, chat)
        items = measured(Variant("m"), Silent(tokenizer.eos_token_id), [found]).items["task"]
        assert {one.response for one in items if one.response is not None} <= {""}


@pytest.mark.parametrize(("chat", "used"), [("on", True), ("auto", False), ("off", False)])
def test_lm_eval_prompts_go_into_the_template_only_where_that_is_asked_for(tmp_path, chat, used):
    from tvlens.evaluation.harness import ready_harness
    from tvlens.evaluation.tasks import HarnessTask, Task, TaskSpec

    spec = TaskSpec(name="task", kind="lm_eval", file="t.yaml")
    task = Task(spec, {0: HarnessTask("t", tmp_path / "t.yaml")})
    assert ready_harness(task, chatty(), chat).chat is used


@pytest.mark.slow
def test_a_study_tokenises_its_tasks_as_the_command_line_says(tmp_path, monkeypatch):
    """``--chat`` reaches the tasks of a sweep: auto takes the template of the tuned model."""
    import shutil

    from tvlens.demo.models import demo_folder
    from tvlens.evaluation import suite
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    folders = {}
    for name in ("base", "med"):
        folders[name] = shutil.copytree(demo_folder(name), tmp_path / name)
        path = folders[name] / "tokenizer_config.json"
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | {"chat_template": TURNS + ASKS}))
    (tmp_path / "items.jsonl").write_text(json.dumps(LINES["exact"][0]) + "\n")
    task = "{name: task, kind: exact, file: items.jsonl, max_new_tokens: 2}"
    (tmp_path / "tasks.yaml").write_text(f"- {task}\n")
    seen = []
    original = suite.ready_writing
    monkeypatch.setattr(
        suite, "ready_writing", lambda *given: seen.append(original(*given)) or seen[-1]
    )
    for chat in ("auto", "off"):
        plan = StudyPlan(
            base=str(folders["base"]),
            tuned=(str(folders["med"]),),
            stages=("sweep",),
            tasks=str(tmp_path / "tasks.yaml"),
            scales="1",
            draws=0,
            chat=chat,
        )
        run_study(plan, tmp_path / chat)
    rendered = [one.tokenizer.decode(one.ids[0]) for one in seen]
    assert rendered[0].endswith("<end>The assistant is")
    assert "<end>" not in rendered[1]
