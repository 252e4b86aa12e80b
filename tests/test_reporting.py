"""The report: what a page says, that it asks for nothing, and that text of a model stays text."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

HOSTILE = "</script><img src=x onerror=alert(1)>"
LAYERS, HEADS, KV_HEADS, NEURONS, PROMPTS = 8, 4, 2, 256, 6
CHROMIUM = shutil.which("chromium")
FLOAT = pa.float64()


class Markup(HTMLParser):
    """Elements, attributes and text of a page, by Python's own parser."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def parsed(page: Path) -> Markup:
    markup = Markup()
    markup.feed(page.read_text("utf-8"))
    return markup


def components():
    from tvlens.components import Component

    made = [Component("embedding", None, None, "W_E"), Component("norm", None, None, "ln_final.w")]
    for layer in range(LAYERS):
        for part in ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out"):
            made.append(Component("matrix", layer, None, part))
        made.append(Component("norm", layer, None, "ln2.w"))
        made += [Component("head", layer, h, p) for h in range(HEADS) for p in ("W_Q", "W_O")]
        made += [Component("kv_head", layer, k, p) for k in range(KV_HEADS) for p in ("W_K", "W_V")]
        made += [Component("neuron", layer, n, "W_out") for n in range(NEURONS)]
    return made


def keyed(items, tuned):
    from tvlens.components import key_columns

    count = len(items)
    return {
        **key_columns(items),
        "base": ["base"] * count,
        "tuned": [tuned] * count,
        "tied": [False] * count,
    }


def weights_table(tuned="med", seed=0):
    from tvlens.tables import Table, keyed_schema

    rng = np.random.default_rng(seed)
    items = components()
    base = rng.uniform(5, 10, len(items))
    share = 0.01 * rng.lognormal(0, 0.5, len(items))
    share[[str(c) == "L5.W_out" for c in items].index(True)] = 0.2
    names = ("base_norm", "delta_norm", "relative_delta", "gain", "residual", "snr")
    columns = {
        **keyed(items, tuned),
        "base_norm": base,
        "delta_norm": base * share,
        "relative_delta": share,
        "gain": rng.normal(0, 0.002, len(items)),
        "residual": share,
        "snr": rng.uniform(10, 1000, len(items)),
    }
    return Table.of("weights", keyed_schema(*((n, FLOAT) for n in names)), columns)


def labels_table(tuned="med"):
    from tvlens.tables import Table, keyed_schema

    items = [c for c in components() if c.kind in ("head", "matrix", "neuron")]
    cycle = ["unresolved"] * 12 + ["new_write", "amplified", "rewired", "mixed", "attenuated"]
    labels = [cycle[i % len(cycle)] for i in range(len(items))]
    schema = keyed_schema(("label", pa.string()), ("label_reason", pa.string()))
    columns = {**keyed(items, tuned), "label": labels, "label_reason": ["planted"] * len(items)}
    return Table.of("labels", schema, columns)


def attribution_table(tuned="med"):
    """weight_ig by prompt whose pieces add up to ``prompt + 1`` exactly, and an exact sample."""
    from tvlens.components import DISJOINT_KINDS
    from tvlens.tables import Table, keyed_schema

    rng = np.random.default_rng(1)
    items = [c for c in components() if c.kind != "neuron"]
    rows: dict[str, list] = {"method": [], "prompt": [], "score": []}
    used = []
    for prompt in range(PROMPTS):
        scores = rng.normal(0, 0.05, len(items))
        pieces = np.array([c.kind in DISJOINT_KINDS for c in items])
        big = [str(c) == "L5.W_out" for c in items].index(True)
        scores[big] = 0.0
        scores[big] = prompt + 1 - scores[pieces].sum()
        exact = [i for i, c in enumerate(items) if c.layer == 5]
        for method, chosen in (("weight_ig", range(len(items))), ("exact_weight_path", exact)):
            used += [items[i] for i in chosen]
            rows["method"] += [method] * len(chosen)
            rows["prompt"] += [prompt] * len(chosen)
            rows["score"] += [float(scores[i]) for i in chosen]
    texts = ("method", "space", "estimator", "direction", "at", "metric", "unit")
    numbers = (("prompt", pa.int32()), ("score", FLOAT), ("n", pa.int32()), ("gap", FLOAT))
    schema = keyed_schema(*((t, pa.string()) for t in texts), *numbers)
    count = len(used)
    columns = {
        **keyed(used, tuned),
        **rows,
        "metric": ["logit_diff"] * count,
        "unit": ["logits"] * count,
    }
    return Table.of("attribution", schema, columns)


def fidelity_table(tuned="med", matrix_passes=True):
    from tvlens.tables import Table

    schema = pa.schema(
        [(n, pa.string()) for n in ("tuned", "method", "kind", "stratum")]
        + [(n, FLOAT) for n in ("n", "spearman", "spearman_worst", "slope", "sign_agreement")]
        + [("ci_low", FLOAT), ("ci_high", FLOAT), ("passed", pa.bool_())]
    )
    kinds = ["matrix", "head", "head"]
    passed = [matrix_passes, True, False]
    columns = {
        "tuned": [tuned] * 3,
        "method": ["weight_ig", "weight_ig", "cross_model_first_order"],
        "kind": kinds,
        "stratum": ["random"] * 3,
        "n": [24.0] * 3,
        "spearman": [0.991 if matrix_passes else 0.41, 0.97, 0.42],
        "spearman_worst": [0.93, 0.9, 0.1],
        "slope": [1.01, 0.98, 2.7],
        "sign_agreement": [1.0, 0.97, 0.6],
        "ci_low": [0.97, 0.95, 0.2],
        "ci_high": [0.999, 0.99, 0.6],
        "passed": passed,
    }
    return Table.of("fidelity", schema, columns)


def prompts_table(tuned="med", tokens=("What", " treats", " fever", "?", HOSTILE, "<i>z</i>\n")):
    from tvlens.tables import Table

    schema = pa.schema(
        [
            *(("prompt", pa.int32()), ("tuned", pa.string()), ("text", pa.string())),
            *(("answer", pa.string()), ("group", pa.string()), ("split", pa.string())),
            *(("tokens", pa.list_(pa.string())), ("token_scores", pa.list_(pa.float32()))),
            *(("metric", pa.string()), ("metric_base", FLOAT), ("metric_tuned", FLOAT)),
        ]
    )
    scores = [0.1 * (i - 2) for i in range(len(tokens))]
    columns = {
        "prompt": list(range(PROMPTS)),
        "tuned": [tuned] * PROMPTS,
        "text": [HOSTILE] * PROMPTS,
        "answer": [HOSTILE] * PROMPTS,
        "group": ["drugs"] * PROMPTS,
        "split": ["choose", "judge"] * (PROMPTS // 2),
        "tokens": [list(tokens)] * PROMPTS,
        "token_scores": [scores] * PROMPTS,
        "metric": ["logit_diff"] * PROMPTS,
        "metric_base": [1.0] * PROMPTS,
        "metric_tuned": [2.0 + p for p in range(PROMPTS)],
    }
    return Table.of("prompts", schema, columns)


def findings_table(tuned="med"):
    from tvlens.tables import Table, keyed_schema

    numbers = (("insert", FLOAT), ("remove", FLOAT))
    schema = keyed_schema(*numbers, ("finding", pa.string()))
    columns = {
        **keyed([c for c in components() if str(c) == "L5.W_out"], tuned),
        "finding": ["necessary"],
        "insert": [0.25],
        "remove": [2.5],
    }
    return Table.of("findings", schema, columns)


def evaluation_table():
    from tvlens.tables import Table

    texts = ("model", "task", "split", "measure", "unit")
    numbers = (("value", FLOAT), ("ci_low", FLOAT), ("ci_high", FLOAT), ("n", pa.int64()))
    columns = {
        "model": ["base", "med", "ctl"] * 2,
        "task": ["medical"] * 3 + ["general"] * 3,
        "split": ["held out"] * 6,
        "measure": ["loss"] * 6,
        "value": [3.25, 2.5, 3.125, 2.75, 2.875, 2.625],
        "ci_low": [3.0, 2.25, 3.0, 2.5, 2.75, 2.5],
        "ci_high": [3.5, 2.75, 3.25, 3.0, 3.0, 2.75],
        "n": [200] * 6,
        "unit": ["nats per token"] * 6,
    }
    schema = pa.schema([*((t, pa.string()) for t in texts), *numbers])
    return Table.of("evaluation", schema, columns)


SENTENCE = "No difference between MLP and attention (p = 0.4)."


def contrasts_table():
    from tvlens.geometry.contrasts import CONTRASTS_SCHEMA
    from tvlens.tables import Table

    columns = {
        "base": ["base"] * 2,
        "tuned": ["med"] * 2,
        "claim": ["newness"] * 2,
        "against": ["raw", "minus controls"],
        "weighting": ["none"] * 2,
        "mean": [0.5, 0.125],
        "verdict": ["supported", "cannot tell"],
        "sentence": ["Raw differences are not quoted.", SENTENCE],
        "headline": [False, True],
        "layers": [[0, 1]] * 2,
        "attention_by_layer": [[0.5, 0.75]] * 2,
        "mlp_by_layer": [[0.25, 0.25]] * 2,
    }
    return Table.of("contrasts", CONTRASTS_SCHEMA, columns)


def write_json_files(folder: Path) -> None:
    tensors = [{"base": "a", "tuned": "a", "status": "compared", "reason": ""}] * 70
    tensors += [{"base": "lm_head", "tuned": None, "status": "tied", "reason": "tied to embed"}]
    report = {
        "tensors": tensors,
        "config_differences": [
            {"field": "rope_theta", "base": 10000, "tuned": 20000, "effect": "function"}
        ],
        "warnings": [f"the tokenizer's token 7 is {HOSTILE}"],
        "identical": False,
        "same_function": {"value": False, "by": [], "residual": 0.1},
    }
    (folder / "load_report.json").write_text(json.dumps(report), "utf-8")
    manifest = {
        "versions": {"tvlens": "0.1.0", "torch": "2.13.0"},
        "command": "tvlens compare demo:base demo:med --prompts demo:med --out DIR",
        "inputs": {"base": {"model.safetensors": "ab" * 32}},
        "stages": {"decompose": {"seconds": 3.5, "peak_resident_bytes": 10**9}},
        "seed": 0,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    plan = {
        "base": "demo:base",
        "tuned": ["demo:med"],
        "tuned_names": ["med"],
        "prompts": "p.jsonl",
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), "utf-8")


def write_study(folder: Path, tables=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json_files(folder)
    made = tables or (
        weights_table(),
        labels_table(),
        contrasts_table(),
        attribution_table(),
        fidelity_table(),
        prompts_table(),
        findings_table(),
        evaluation_table(),
    )
    for table in made:
        table.save(folder)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(study) -> Path:
    from tvlens.reporting.report import render_report

    return render_report(study)


@pytest.fixture(scope="module")
def markup(page) -> Markup:
    return parsed(page)


@pytest.mark.slow
def test_the_page_is_written_into_the_study_folder_and_is_small(page, study):
    assert page == study / "report.html"
    assert page.stat().st_size < 8 * 2**20


@pytest.mark.slow
def test_the_same_files_give_the_same_bytes_in_another_folder(page, study, tmp_path):
    from tvlens.reporting.report import render_report

    copy = tmp_path / "elsewhere"
    shutil.copytree(study, copy)
    (copy / "report.html").unlink()
    assert render_report(copy).read_bytes() == page.read_bytes()


def test_nothing_in_the_page_can_ask_the_network(page, markup):
    loading = {"src", "srcset", "poster", "data", "action", "formaction", "background"}
    assert not [a for a in markup.attributes if a[1] in loading]
    links = [value for _, name, value in markup.attributes if name in ("href", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(markup.tags)
    style = re.search(r"<style>(.*?)</style>", page.read_text("utf-8"), re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_policy_forbids_all_but_the_scripts_of_the_page(page):
    text = page.read_text("utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "unsafe-inline" not in policy[1].split("style-src")[0]


def test_text_of_a_model_never_becomes_markup(page, markup):
    assert "img" not in markup.tags
    assert "i" not in markup.tags
    assert not [name for _, name, _ in markup.attributes if name.startswith("on")]
    assert markup.tags.count("script") == 2
    assert HOSTILE in "".join(markup.text)
    assert "<img" not in page.read_text("utf-8")


def test_scripts_get_tokens_escaped_for_raw_html_and_for_the_script(markup):
    calls = markup.scripts[-1]
    assert "CircuitsVis.render(" in calls
    assert "<" not in calls
    properties = json.loads(re.search(r"ColoredTokens,(\{.*\})\);$", calls, re.M)[1])
    assert properties["tokens"][4] == "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;"
    assert properties["values"] == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.2, 0.3])
    assert properties["minValue"] == -properties["maxValue"]


def test_ids_are_unique_and_every_reference_has_its_target(markup):
    ids = [value for _, name, value in markup.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {v[1:] for _, name, v in markup.attributes if name == "href"}
    assert targets <= set(ids)
    rendered = set(re.findall(r'CircuitsVis\.render\("([^"]+)"', markup.scripts[-1]))
    assert rendered
    assert rendered <= set(ids)


def test_the_answer_states_size_and_place_as_the_tables_give_them(markup):
    frame = weights_table().to_frame()
    squares = {"base": 0.0, "delta": 0.0, "mlp": 0.0, "layer5": 0.0, "layers": 0.0}
    for row in frame.itertuples():
        if row.kind not in ("matrix", "norm", "bias", "embedding"):
            continue
        squares["base"] += row.base_norm**2
        squares["delta"] += row.delta_norm**2
        squares["mlp"] += row.delta_norm**2 * (row.part in ("W_gate", "W_in", "W_out"))
        squares["layer5"] += row.delta_norm**2 * (row.layer == 5)
        squares["layers"] += row.delta_norm**2 * (not math.isnan(row.layer))
    ratio = 100 * math.sqrt(squares["delta"] / squares["base"])
    said = re.search(r"of med has ([\d.]+) % of the base weights' length", markup.words)
    assert said is not None
    assert float(said[1]) == pytest.approx(ratio, rel=0.01)
    mlp = re.search(r"squared length, ([\d.]+) % is in MLP", markup.words)
    assert mlp is not None
    assert float(mlp[1]) == pytest.approx(100 * squares["mlp"] / squares["delta"], rel=0.01)
    layer = re.search(r"layer 5 holds most \(([\d.]+) %", markup.words)
    assert layer is not None
    assert float(layer[1]) == pytest.approx(100 * squares["layer5"] / squares["layers"], rel=0.01)


def test_the_answer_counts_labels_and_repeats_the_headline(markup):
    labels = labels_table().to_frame()
    new = int(((labels["kind"] == "neuron") & (labels["label"] == "new_write")).sum())
    assert f"{LAYERS * NEURONS:,} neurons: " in markup.words
    assert f"{new:,} new write" in markup.words
    assert SENTENCE in markup.words
    assert "Raw differences are not quoted." not in markup.words


def test_the_answer_names_the_planted_component_and_the_change_with_its_sign(markup):
    assert "logit_diff changes by +3.5 logits on average over 6 prompts" in markup.words
    assert re.search(r"Among matrices: L5\.W_out \(\+", markup.words)
    assert "The parts add up to the change to within" in markup.words


@pytest.mark.slow
def test_a_ranking_whose_check_failed_is_withheld(tmp_path):
    from tvlens.reporting.report import render_report

    tables = (attribution_table(), fidelity_table(matrix_passes=False), prompts_table())
    words = parsed(render_report(write_study(tmp_path / "s", tables))).words
    assert "Withheld: the estimate did not pass its check" in words
    assert "L5.W_out (+" not in words
    assert "weight_ig for matrices (Spearman 0.41, slope 1.01, n = 24)" in words


def test_a_kind_with_too_few_components_is_judged_by_all_kinds():
    import pandas as pd

    from tvlens.reporting.scores import decisions

    def rows(**passed):
        kinds = list(passed)
        same = {"method": "weight_ig", "stratum": "random", "part": None}
        return pd.DataFrame({"kind": kinds, "passed": list(passed.values())}).assign(**same)

    kinds = ("matrix", "norm")
    judged = decisions(rows(matrix=None, norm=False, all=True), kinds)
    assert judged == {"matrix": "passed", "norm": "withheld"}
    assert decisions(rows(matrix=True, all=False), kinds) == {
        "matrix": "passed",
        "norm": "withheld",
    }
    assert set(decisions(rows(matrix=None), kinds).values()) == {"not checked"}


@pytest.mark.slow
def test_an_unchecked_ranking_is_withheld(tmp_path):
    from tvlens.reporting.report import render_report

    words = parsed(render_report(write_study(tmp_path / "s", (attribution_table(),)))).words
    assert "Withheld: the ranking was not checked" in words


@pytest.mark.slow
def test_parts_that_do_not_add_up_are_said_not_to(tmp_path):
    from tvlens.reporting.report import render_report

    table = prompts_table()
    wrong = pa.array([3.0 + 2 * p for p in range(PROMPTS)])
    place = table.data.schema.get_field_index("metric_tuned")
    changed = type(table)("prompts", table.data.set_column(place, "metric_tuned", wrong))
    tables = (attribution_table(), fidelity_table(), changed)
    words = parsed(render_report(write_study(tmp_path / "s", tables))).words
    assert "to within 50 %" in words
    assert "the aim is 0.2 %" in words


def test_held_out_losses_go_from_base_to_tuned(markup):
    assert "medical 3.25 → 2.5; general 2.75 → 2.875" in markup.words


def test_estimates_stand_beside_exact_swings_of_the_same_prompts(markup):
    rows = attribution_table().to_frame()
    mean = rows[(rows["component"] == "L5.W_out") & (rows["method"] == "exact_weight_path")]
    exact = f"{mean['score'].mean():+.3g}"
    row = re.search(r"L5\.W_out passed necessary (\S+ \S+ \S+ \S+ \S+ \S+)", markup.words)
    assert row is not None
    assert row[1].split()[2:] == [exact, exact, "+0.25", "+2.5"]


def test_choose_ranks_and_judge_is_reported(markup):
    rows = attribution_table().to_frame()
    rows = rows[(rows["component"] == "L5.W_out") & (rows["method"] == "weight_ig")]
    means = [f"{rows[rows['prompt'] % 2 == parity]['score'].mean():+.3g}" for parity in (0, 1)]
    row = re.search(r"L5\.W_out passed necessary (\S+ \S+)", markup.words)
    assert row is not None
    assert row[1].split() == means


def test_heat_maps_hold_every_layer_and_head(page):
    text = page.read_text("utf-8")
    for name, count in (
        ("size-head", 4),
        ("size-kv_head", 2),
        ("size-matrix", 7),
        ("score-head", 4),
    ):
        drawing = re.search(rf'<svg id="m1-{name}".*?</svg>', text, re.S)
        assert drawing is not None
        cells = re.search(r'<g class="cells">(.*?)</g>', drawing[0], re.S)
        assert cells is not None
        assert cells[1].count("<rect") == LAYERS * count


def test_a_cell_of_the_maps_holds_the_value_of_its_head(page):
    text = page.read_text("utf-8")
    weights = weights_table().to_frame().set_index("component")
    both = weights.loc[["L3H2.W_Q", "L3H2.W_O"]]
    size = math.hypot(*both["delta_norm"]) / math.hypot(*both["base_norm"])
    assert f"<title>layer 3 head 2: {size:.4g}</title>" in text
    matrix = weights.loc["L6.W_gate", "relative_delta"]
    assert f"<title>layer 6 W_gate: {matrix:.4g}</title>" in text
    rows = attribution_table().to_frame()
    scores = rows[(rows["method"] == "weight_ig") & (rows["site"] == "L3H2")]
    mean = scores["score"].sum() / PROMPTS
    assert f"<title>layer 3 head 2: {mean:.4g} logits</title>" in text


def test_json_for_a_script_holds_nothing_that_ends_one():
    from tvlens.reporting.circuitsvis import script_json

    hostile = [HOSTILE, "\u2028\u2029&<!--"]
    text = script_json(hostile)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == hostile
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json([math.nan])


@pytest.mark.slow
def test_hostile_names_stay_text_wherever_they_come_from(tmp_path):
    from tvlens.reporting.report import render_report

    def renamed(table):
        data = table.data
        for place, field in enumerate(data.schema):
            if field.type == pa.string() and field.name not in (
                "kind",
                "part",
                "method",
                "stratum",
            ):
                words = [f"{HOSTILE}{word}" for word in data.column(place).to_pylist()]
                data = data.set_column(place, field, pa.array(words))
        return type(table)(table.name, data)

    makers = (weights_table, labels_table, attribution_table, fidelity_table)
    makers = (*makers, prompts_table, findings_table, evaluation_table)
    folder = write_study(tmp_path / "s", [renamed(make()) for make in makers])
    for name in ("load_report.json", "manifest.json"):
        content = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(_hostile(content)), "utf-8")
    plan = {"base": HOSTILE, "tuned": [HOSTILE], "tuned_names": [f"{HOSTILE}med"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(plan), "utf-8")
    page = render_report(folder)
    markup = parsed(page)
    assert "img" not in markup.tags
    assert "<img" not in page.read_text("utf-8")
    assert f"tuning vector of {HOSTILE}med" in markup.words


def _hostile(content):
    if isinstance(content, dict):
        return {key: _hostile(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_hostile(value) for value in content]
    return f"{HOSTILE}{content}" if isinstance(content, str) else content


@pytest.mark.slow
def test_without_circuitsvis_the_tokens_are_plain_coloured_text(study, tmp_path, monkeypatch):
    from tvlens.reporting import report

    copy = tmp_path / "s"
    shutil.copytree(study, copy)
    monkeypatch.setattr(report, "bundle", lambda: "")
    markup = parsed(report.render_report(copy))
    assert "script" not in markup.tags
    assert ("span", "class", "token") in markup.attributes
    assert any("script-src 'none'" in v for _, n, v in markup.attributes if n == "content")


@pytest.mark.slow
def test_a_study_of_two_fine_tunes_has_a_part_for_each(tmp_path):
    from tvlens.reporting.report import render_report
    from tvlens.tables import concatenated

    both = concatenated("weights", [weights_table("med"), weights_table("math", seed=3)])
    markup = parsed(render_report(write_study(tmp_path / "s", (both,))))
    ids = {value for _, name, value in markup.attributes if name == "id"}
    assert {"m1-size-head", "m2-size-head"} <= ids
    assert "tuning vector of med" in markup.words
    assert "tuning vector of math" in markup.words


def test_missing_files_leave_the_command_that_makes_them(tmp_path):
    from tvlens.reporting.report import render_report

    folder = tmp_path / "empty"
    folder.mkdir()
    words = parsed(render_report(folder)).words
    assert "tvlens decompose BASE TUNED --out DIR" in words
    assert "tvlens attribute BASE TUNED --prompts FILE --out DIR" in words
    assert "tvlens evaluate BASE TUNED --tasks FILE --out DIR" in words
    assert words.count("Not in this study") == 1
    assert "tvlens combine" not in words  # there is one fine-tune at most


def _headings(page: Path) -> list[str]:
    import re

    return re.findall(r"<h[23][^>]*>(.*?)</h[23]>", page.read_text("utf-8"))


@pytest.mark.slow
def test_a_study_of_one_stage_has_the_sections_of_that_stage_and_one_line_on_the_others(tmp_path):
    from tvlens.reporting.report import render_report
    from tvlens.tables import Table

    folder = write_study(tmp_path / "s", (weights_table(),))
    page = render_report(folder)
    assert _headings(page) == [
        "The answer", "What was compared", "med", "Where the weights changed", "Reproduce",
    ]  # fmt: skip
    words = parsed(page).words
    assert words.count("Not in this study") == 1
    line = words[words.index("Not in this study") :]
    for parts, command in {
        "MLP against attention, labels, new directions by name, the paper's readings": "decompose",
        "what matters, how far the estimates can be trusted, prompts token by token": "attribute",
        "the smallest set that carries it": "graft",
        "by dose": "sweep",
        "what it does to the representations": "represent",
        "held-out data": "evaluate",
    }.items():
        assert f"{parts}: tvlens {command} " in line
    assert "where the weights changed" not in line
    assert "Make it with" not in words
    curves = {"curve": ["sweep"], "tuned": ["med"], "task": ["t"], "scale": [1.0], "value": [1.0]}
    data = pa.table(
        {**curves, "ranked_by": ["tuning"], "split": ["all"], "metric": ["loss"], "n": [3]}
    )
    Table("curves", data).save(folder)
    assert "by dose: tvlens sweep" not in parsed(render_report(folder)).words


def test_models_that_were_measured_alone_are_no_fine_tune_without_sections(tmp_path):
    from tvlens.reporting.report import render_report

    evaluation_table().save(tmp_path)
    page = render_report(tmp_path)
    assert _headings(page) == ["On held-out data", "Reproduce"]
    assert "→ tuned" not in parsed(page).words


def test_of_several_fine_tunes_the_command_that_combines_them_is_named(tmp_path):
    from tvlens.reporting.report import render_report

    (tmp_path / "study.yaml").write_text("base: b\ntuned: [one, two]\ntasks: t.yaml\n")
    words = parsed(render_report(tmp_path)).words
    assert "tuning vectors combined: tvlens combine b one two --tasks t.yaml --out DIR" in words


@pytest.mark.slow
@pytest.mark.parametrize("kept", range(7))
def test_any_single_table_makes_a_page(tmp_path, kept):
    from tvlens.reporting.report import render_report

    makers = (
        *(weights_table, labels_table, attribution_table, fidelity_table),
        *(prompts_table, findings_table, evaluation_table),
    )
    page = render_report(write_study(tmp_path / "s", (makers[kept](),)))
    words = parsed(page).words
    assert "Made by tvlens from the tables of this study alone" in words
    assert ("The answer" in words) == (kept not in (4, 5))  # prompts, findings answer nothing


@pytest.mark.slow
def test_identical_models_are_said_to_be_identical(tmp_path):
    from tvlens.reporting.report import render_report
    from tvlens.tables import Table

    table = weights_table()
    zero = pa.array([0.0] * len(table))
    data = table.data
    for name in ("delta_norm", "relative_delta", "gain", "residual"):
        data = data.set_column(data.schema.get_field_index(name), name, zero)
    folder = write_study(tmp_path / "s", (Table("weights", data),))
    (folder / "load_report.json").write_text('{"tensors": [], "identical": true}', "utf-8")
    words = parsed(render_report(folder)).words
    assert "the tuning vector of med is zero" in words
    assert "The two checkpoints are identical." in words


def test_a_broken_file_is_named(tmp_path):
    from tvlens.errors import StudyError
    from tvlens.reporting.report import render_report

    with pytest.raises(StudyError, match="there is no study folder"):
        render_report(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{", "utf-8")
    with pytest.raises(StudyError, match=r"cannot read .*manifest\.json"):
        render_report(tmp_path)


def test_a_prompt_without_finite_scores_is_left_out_and_counted(tmp_path):
    from tvlens.reporting.report import render_report

    table = prompts_table()
    place = table.data.schema.get_field_index("token_scores")
    scores = [[float("nan")] * 6] + [[0.5] * 6] * (PROMPTS - 1)
    data = table.data.set_column(place, "token_scores", pa.array(scores, pa.list_(pa.float32())))
    words = parsed(
        render_report(write_study(tmp_path / "s", (type(table)("prompts", data),)))
    ).words
    assert "5 of 6 prompts are shown. 1 left out" in words


def test_colours_are_symmetric_about_zero_and_darken_with_magnitude():
    from tvlens.reporting.figures import MAGNITUDE, SIGNED, colour_at

    assert colour_at(SIGNED, 0.5) == (247, 247, 247)
    assert colour_at(SIGNED, 0.0) == (33, 102, 172)
    assert colour_at(SIGNED, 1.0) == (178, 24, 43)
    sums = [sum(colour_at(MAGNITUDE, i / 20)) for i in range(21)]
    assert sums == sorted(sums, reverse=True)


def test_sampling_keeps_rare_labels_whole_and_the_limit():
    import pandas as pd

    from tvlens.reporting.figures import sampled_by_label

    labels = pd.Series(["unresolved"] * 9000 + ["amplified"] * 30 + ["new_write"] * 3000)
    kept = sampled_by_label(labels, limit=4000)
    counts = labels.iloc[kept].value_counts()
    assert len(kept) == len(set(kept.tolist())) == 4000
    assert counts["amplified"] == 30
    assert counts["unresolved"] == counts["new_write"] == 1985
    assert sampled_by_label(labels[:100], limit=4000).tolist() == list(range(100))


def test_a_token_plot_refuses_what_json_cannot_say():
    from tvlens.reporting.circuitsvis import TokenPlot

    with pytest.raises(ValueError, match="2 tokens but 1 scores"):
        TokenPlot("a", ("x", "y"), (1.0,), 1.0)
    with pytest.raises(ValueError, match="not finite"):
        TokenPlot("a", ("x",), (math.nan,), 1.0)


def chromium(page: Path, scratch: Path, *options: str) -> str:
    """Run headless Chromium on ``page``; it runs as root in containers, hence no sandbox there."""
    assert CHROMIUM is not None
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [
        *(CHROMIUM, "--headless", *sandbox, "--disable-gpu", "--disable-background-networking"),
        *("--no-first-run", "--virtual-time-budget=20000", f"--user-data-dir={scratch}"),
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
def test_chromium_draws_the_tokens_as_text_and_runs_nothing_of_theirs(page, tmp_path):
    drawn = Markup()
    drawn.feed(chromium(page, tmp_path / "profile", "--dump-dom"))
    assert "img" not in drawn.tags
    assert "i" not in drawn.tags
    assert drawn.tags.count("script") == 2
    classes = [value for _, name, value in drawn.attributes if name == "class"]
    assert classes.count("colored-tokens") == PROMPTS
    assert HOSTILE.replace(" ", "\u00a0") in "".join(drawn.text)


def test_a_signed_cell_has_the_colour_of_its_own_share_of_the_largest():
    from tvlens.reporting.figures import SIGNED, Grid, colour_at, heat_map, hex_code

    values = np.array([[-1.0, -0.5, 0.0, 0.5, 1.0]])
    grid = Grid("g", "g", values, ("0",), tuple("abcde"), signed=True)
    fills = [cell.fill for cell in heat_map(grid).cells]
    assert fills == [hex_code(colour_at(SIGNED, place)) for place in (0.0, 0.25, 0.5, 0.75, 1.0)]


def test_the_two_circuits_of_a_head_are_counted_apart() -> None:
    from tvlens.reporting.scores import labelled_groups

    rows = [("head", "L0H0", "OV"), ("head", "L0H0", "QK"), ("head", "L0H1", "OV")]
    rows += [("neuron", "L0N3", "W_in"), ("neuron", "L0N3", "W_out"), ("norm", "L0.ln1", None)]
    labels = pd.DataFrame(rows, columns=["kind", "site", "part"])
    groups = {words: len(found) for words, found in labelled_groups(labels)}
    assert groups["heads (OV)"] == 2
    assert groups["head (QK)"] == 1
    assert groups["neuron vectors"] == 2
    assert sum(groups.values()) == len(rows)


@pytest.mark.demo
def test_a_heads_label_in_the_tables_is_that_of_ov(demo_study: Path) -> None:
    from tvlens.reporting.folder import StudyFolder
    from tvlens.reporting.scores import labels_for

    labels = pd.read_parquet(demo_study / "labels.parquet")
    heads = labels[labels["kind"] == "head"]
    assert set(heads["part"]) == {"OV", "QK"}
    ov = heads[heads["part"] == "OV"]
    rows = pd.DataFrame({"component": ov["site"] + ".W_O", "site": ov["site"]})
    assert labels_for(StudyFolder.read(demo_study), "med", rows) == ov["label"].tolist()
