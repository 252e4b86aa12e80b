"""A plan before it runs: its rows are those of the real tables, its costs those of real stages."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.large_checkpoints import hollow_llama
from tests.memory_watch import WATCH
from tests.planned_tables import RATES
from tests.tiny_checkpoints import (
    add_noise,
    copy_with,
    tiny_adapter,
    tiny_gpt2,
    tiny_llama,
    tiny_neox,
    tiny_qwen3,
)
from tvlens.errors import CheckpointError, PromptError

MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: tiny_llama(folder, intermediate_size=600),  # beyond the top 1,000
    "tied llama": lambda folder: tiny_llama(folder, tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "neox": tiny_neox,
    "qwen3": tiny_qwen3,
}
DIVIDED = {"parts": True, "circuits": True}
WEIGHT_KINDS = ("matrix", "norm", "bias", "embedding", "head", "kv_head", "neuron")


@pytest.fixture(scope="module", params=MAKERS)
def folders(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    base = MAKERS[request.param](root / "base")
    return base, copy_with(base, root / "tuned", add_noise())


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]):
    from tvlens.weights.matching import load_pair

    return load_pair(*folders)


@pytest.fixture(scope="module")
def weights(pair):
    from tvlens.geometry.decompose import decompose

    return decompose(pair)


@pytest.fixture(scope="module")
def prompts():
    """Five prompts, two of them with a corrupt one."""
    from tvlens.models.prompts import Batch, Prompt, PromptSet

    drawn = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 40, (count,), generator=drawn).tolist()

    lengths = (9, 6, 11, 7, 5)
    batch = Batch.of_ids(
        [ids(n) for n in lengths],
        answers=[ids(2) for _ in lengths],
        corrupts=[ids(n) if n < 7 else [] for n in lengths],
    )
    return PromptSet(tuple(Prompt(f"prompt {n}", "answer") for n in lengths)), batch


@pytest.fixture(scope="module")
def attributed(pair, prompts) -> dict[str, pd.DataFrame]:
    """The real tables of attribution, with an exact sample of 17 components."""
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair
    from tvlens.study.attributing import _attributed

    asked, batch = prompts
    made = _attributed(
        _plan(check_exact=17, check_prompts=3, **DIVIDED),
        HookedPair(pair),
        asked,
        batch,
        SHIPPED["logprob"],
        lambda text: None,
    )
    return {table.name: table.to_frame() for table in made.tables}


def _plan(**options: Any):
    from tvlens.study.plan import StudyPlan

    return StudyPlan(base="b", tuned=("t",), **options)


def _words(nodes: str = "default", *directions: str):
    from tvlens.attribution.exchanges import Words

    return Words(nodes, directions)


def _asked(estimators: tuple[str, ...] = ("first_order",), **options: Any):
    from tvlens.study.row_counts import Asked

    options = {"words": _words()._replace(estimators=estimators), **options}
    return Asked(prompts=5, corrupt=2, check_exact=17, check_prompts=3, **options)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rows_of_weights_and_labels_are_those_of_the_tables(pair, weights) -> None:
    from tvlens.geometry.classify import classify
    from tvlens.study.row_counts import label_rows, tested_rows, weight_rows

    labels = classify(pair, weights)
    for planned, made in ((weight_rows(pair), weights), (label_rows(pair), labels.labels)):
        assert planned.known
        assert planned.at_least == len(made)
        assert dict(planned.by) == made.to_frame()["kind"].value_counts().to_dict()
    bound = tested_rows(pair, ())
    assert not bound.known
    assert 0.5 * bound.at_most < len(labels.tests) <= bound.at_most


@pytest.mark.slow
def test_the_rows_of_the_estimates_are_those_of_the_table(pair, attributed) -> None:
    from tvlens.study.row_counts import estimate_rows

    made = attributed["attribution"]
    estimates = made[made["estimator"] != "exact"]
    planned = estimate_rows(pair, _asked(**DIVIDED))
    assert planned.known
    assert dict(planned.by) == estimates["method"].value_counts().to_dict()


@pytest.mark.slow
def test_the_components_with_rows_per_prompt_are_those_of_the_table(pair, attributed) -> None:
    from tvlens.attribution.series import whole_rows
    from tvlens.study.row_counts import activation_sizes, weight_sizes

    made = whole_rows(attributed["attribution"])
    made = made[made["prompt"] == 0]
    ig = _groups(made[made["method"] == "weight_ig"])
    planned = weight_sizes(pair, _asked())
    assert {group: size for group, size in planned.items() if size} == ig
    across = made[(made["estimator"] != "exact") & (made["direction"] == "base_into_tuned")]
    across = _groups(across[across["space"] == "activation"])
    (one,) = [o for o in _asked().exchanges(pair.layout) if o.direction == "base_into_tuned"]
    assert activation_sizes(pair.layout, _asked(), one.parts) == across


def _groups(frame: pd.DataFrame) -> Counter:
    """Rows of every kind, activations of heads and neurons part by part."""
    from tvlens.attribution.series import group_of, keys

    return Counter(map(group_of, keys(frame)))


@pytest.mark.slow
def test_every_table_of_attribution_has_the_rows_that_were_planned(
    pair, weights, attributed
) -> None:
    from tvlens.attribution.joins import size_and_effect
    from tvlens.attribution.shares import shares_table
    from tvlens.attribution.tables import ATTRIBUTION_SCHEMA
    from tvlens.study.row_counts import attribution_tables
    from tvlens.tables import Table

    planned = attribution_tables(pair, _asked(**DIVIDED), joined=True)
    for name in ("prompts", "attribution", "fidelity", "findings"):
        assert planned[name].known, name
        assert planned[name].at_least == len(attributed[name]), name
    assert planned["roles"].at_least <= len(attributed["roles"]) <= planned["roles"].at_most
    frame = attributed["attribution"]
    columns = {name: frame[name].astype(object).to_list() for name in ATTRIBUTION_SCHEMA.names}
    scores = Table.of("attribution", ATTRIBUTION_SCHEMA, columns)
    assert planned["joins"].at_least == len(size_and_effect(weights, scores))
    shares = shares_table(scores, weights=weights)
    assert len(shares) == planned["shares"].at_least


@pytest.mark.slow
def test_the_rows_of_a_run_that_divides_nothing_are_fewer_by_those_of_parts_and_circuits(
    pair, attributed
) -> None:
    from tvlens.attribution.series import whole_rows
    from tvlens.study.row_counts import estimate_rows

    made = whole_rows(attributed["attribution"])
    found = made[made["estimator"] != "exact"]["method"].value_counts().to_dict()
    assert dict(estimate_rows(pair, _asked()).by) == found


@pytest.mark.slow
def test_all_parts_in_all_directions_have_the_rows_that_were_planned(pair, prompts) -> None:
    from tvlens.attribution.exchanges import parts_there
    from tvlens.attribution.nodes import all_parts
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair
    from tvlens.study.attributing import _attributed
    from tvlens.study.row_counts import attribution_tables, estimate_rows, position_shapes

    asked, batch = prompts
    hooked, words = HookedPair(pair), ("all", ("all", "clean_into_corrupt@base"))
    assert all_parts(hooked.base) == parts_there(gated=pair.layout.gated)
    plan = _plan(
        nodes=words[0],
        directions=words[1],
        edges=True,
        position=True,
        check_exact=17,
        check_prompts=3,
    )
    made = _attributed(plan, hooked, asked, batch, SHIPPED["logprob"], lambda text: None)
    tables = {table.name: table.to_frame() for table in made.tables}
    named = _words("all", *words[1])._replace(edges=True)
    counted = _asked(words=named, longest=13, position=True)
    estimates = tables["attribution"][tables["attribution"]["estimator"] != "exact"]
    by_method = estimates["method"].value_counts().to_dict()
    assert dict(estimate_rows(pair, counted).by) == by_method
    planned = attribution_tables(pair, counted, joined=False)
    for name in ("prompts", "attribution", "fidelity", "findings"):
        assert planned[name].at_least == planned[name].at_most == len(tables[name]), name
    for name in ("roles", "circuits"):
        assert planned[name].at_least <= len(tables[name]) <= planned[name].at_most, name
    assert planned["edge_circuits"].at_most > 0
    assert "edge_circuits" not in tables
    assert sum("no circuits of edges" in said for said in made.warnings) == 3  # no splits here
    shapes = [
        tuple(tensor["shape"])
        for series in made.positions
        for tensor in series.entry["tensors"].values()
    ]
    for shape, most in zip(shapes, position_shapes(pair, counted), strict=True):
        assert (shape[0], *shape[2:]) == (most[0], *most[2:])
        assert shape[1] <= most[1]  # of prompts with a corrupt twin the longest may be shorter
    assert "mean_ablation" in "".join(made.warnings)


def test_a_sample_by_time_lies_between_the_bounds() -> None:
    from tvlens.attribution.sampling import drawn_sizes
    from tvlens.study.row_counts import Asked

    few, many = Asked(prompts=28).samples
    assert (few.count, few.prompts) == (21, 4)
    assert (many.count, many.prompts) == (210, 16)
    assert drawn_sizes({("head", "z"): 100, ("neuron", "post"): 1064}, 400) == {
        ("head", "z"): (50, 50),
        ("neuron", "post"): (150, 64),
    }


def test_every_activation_of_a_kind_gets_its_share_of_the_sample() -> None:
    from tvlens.attribution.sampling import drawn_sizes

    sizes = {("neuron", "pre"): 1064, ("head", "z"): 8, ("head", "q"): 8, ("bias", None): 0}
    drawn = drawn_sizes(sizes, 30)
    assert drawn == {
        ("head", "q"): (4, 4),
        ("head", "z"): (4, 4),
        ("neuron", "pre"): (7, 7),
    }
    assert [*drawn] == [("head", "q"), ("head", "z"), ("neuron", "pre")]


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 21, 40, 500])
def test_the_planned_sample_is_the_drawn_one(attributed, count: int) -> None:
    from tvlens.attribution.sampling import drawn_sizes, sampled_strata
    from tvlens.attribution.series import group_of, whole_rows
    from tvlens.attribution.tables import ATTRIBUTION_SCHEMA
    from tvlens.tables import Table

    frame = attributed["attribution"]
    frame = whole_rows(frame[frame["method"] == "weight_ig"])
    columns = {name: frame[name].astype(object).to_list() for name in ATTRIBUTION_SCHEMA.names}
    drawn = sampled_strata(Table.of("attribution", ATTRIBUTION_SCHEMA, columns), count=count)
    planned = drawn_sizes(_groups(frame[frame["prompt"] == 0]), count)
    for place, stratum in enumerate(("top", "random")):
        found = Counter(map(group_of, drawn[stratum]))
        assert {k: n[place] for k, n in planned.items() if n[place]} == dict(found)


@pytest.mark.slow
def test_the_candidates_of_a_graft_are_those_of_the_partition(pair) -> None:
    from tvlens.attribution.gates import GatedModel
    from tvlens.attribution.grafting import _sizes
    from tvlens.attribution.partition import partition
    from tvlens.models.lens import LensModel
    from tvlens.study.row_counts import candidates, graft_sizes
    from tvlens.weights.vector import tuning_vector

    gated = GatedModel.of_vector(LensModel.load(pair.base.folder), tuning_vector(pair))
    count = len(partition(gated).components)
    assert candidates(pair) == count
    assert graft_sizes(count) == len(_sizes(count))
    assert [graft_sizes(n) for n in (1, 2, 3, 4, 5)] == [len(_sizes(n)) for n in (1, 2, 3, 4, 5)]


@pytest.mark.slow
def test_a_family_without_a_table_has_rows_and_no_attribution(tmp_path: Path) -> None:
    from tvlens.study.inspection import inspection

    base = tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "unheard"}
    (base / "config.json").write_text(json.dumps(config))
    tuned = copy_with(base, tmp_path / "tuned", add_noise())
    found = inspection(str(base), str(tuned), rates=RATES)
    from tvlens.geometry.decompose import decompose
    from tvlens.weights.matching import load_pair

    rows = found["stages"]["decompose"]["tables"]["weights"]
    assert rows["rows"] == len(decompose(load_pair(base, tuned)))
    assert "no table for the family 'unheard'" in found["stages"]["attribute"]["cannot_run"]


BOUNDED = ("directions", "overlap", "readings", "roles", "tests")
"""Tables whose rows depend on what is found."""


@pytest.mark.demo
def test_the_demo_study_has_the_rows_that_its_plan_says(demo_study: Path) -> None:
    from tvlens.study.demo import demo_plan
    from tvlens.study.inspection import inspection

    plan = demo_plan().model_dump(exclude={"base", "tuned", "tuned_names"})
    found = inspection("demo:base", "demo:med", rates=RATES, **plan)
    planned = [s.get("tables", {}) for s in found["stages"].values()]
    tables = {name: rows for stage in planned for name, rows in stage.items()}
    assert {*tables} == {path.stem for path in demo_study.glob("*.parquet")}
    for name, rows in tables.items():
        made = len(pd.read_parquet(demo_study / f"{name}.parquet"))
        if name in BOUNDED:
            assert rows["at_least"] <= made <= rows["at_most"], name
            assert name in ("roles", "tests") or made > rows["at_most"] / 4, name
        else:
            assert rows["rows"] == made, name


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bytes_are_those_of_the_files_without_their_headers(pair) -> None:
    from tvlens.study.work import stored_bytes

    for source, counted in zip((pair.base, pair.tuned), stored_bytes(pair), strict=True):
        size = 0
        for name in source.files:
            data = (source.folder / name).read_bytes()
            size += len(data) - 8 - int.from_bytes(data[:8], "little")
        assert counted == size


@pytest.mark.slow
def test_the_bytes_that_decompose_reads_are_counted(pair, monkeypatch) -> None:
    from tvlens.geometry.decompose import decompose
    from tvlens.study.work import read_bytes
    from tvlens.weights.sources.folder import Source

    read = []
    for method in ("read", "read_rows"):
        original = getattr(Source, method)

        def counted(self, *args, original=original):
            tensor = original(self, *args)
            read.append(tensor.numel() * tensor.element_size())
            return tensor

        monkeypatch.setattr(Source, method, counted)
    decompose(pair)
    assert sum(read) == read_bytes(pair, pair.components)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 24), ("bfloat16", 12), ("float64", 48), ("I64", 48), ("BOOL", 6), ("U8", 6)],
)
def test_a_tensors_bytes_follow_its_dtype(dtype: str, size: int) -> None:
    from tvlens.weights.sources.folder import TensorInfo

    assert TensorInfo(dtype, (2, 3), "model.safetensors").stored_bytes == size


@pytest.mark.slow
def test_an_adapter_reads_its_factors_and_the_bases_weights(tmp_path: Path) -> None:
    from tvlens.study.inspection import inspection

    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    found = inspection(str(base), str(adapter), rates=RATES)
    size = found["bytes"]
    assert found["stages"]["decompose"]["bytes_read"] == size["base"] + size["tuned"]
    assert size["tuned"] < size["base"] / 4


# --- work ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_pair(tmp_path_factory):
    """Wide enough that matrix products are the work."""
    from tvlens.weights.matching import load_pair

    root = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 1}
    base = tiny_llama(root / "base", vocab_size=500, **sizes)
    return load_pair(base, copy_with(base, root / "tuned", add_noise()))


def _products(run: Callable[[], object]) -> int:
    """Floating-point operations of the products of torch and of numpy."""
    from torch.utils.flop_counter import FlopCounterMode

    numpys, matmul = 0, np.matmul

    def counted(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        nonlocal numpys
        numpys += 2 * left.size * right.shape[-1]
        return matmul(left, right)

    with FlopCounterMode(display=False) as counter, pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", counted)
        run()
    return counter.get_total_flops() + numpys


@pytest.mark.slow
def test_the_products_of_decompose_are_those_that_run(wide_pair) -> None:
    """torch counts all but the QR of the circuits, which stands for some of ours."""
    from tvlens.geometry.decompose import decompose
    from tvlens.study import work

    layout = replace(wide_pair.layout)
    counted = work.decompose_work(wide_pair)["product"]
    width, d_model = layout.d_head, layout.d_model
    qr = 2 * layout.n_heads * work.QR_SLOWNESS * 8 * (2 * width) ** 2 * d_model
    assert counted - qr == pytest.approx(_products(lambda: decompose(wide_pair)), rel=0.25)


def test_the_products_of_a_pass_are_those_that_run(wide_pair) -> None:
    """Prompts long enough that attention is a tenth of it."""
    from tvlens.models.lens import LensModel
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.prompts import Batch
    from tvlens.models.reading import Reading
    from tvlens.study import work

    ids = torch.randint(3, 40, (3, 58), generator=torch.Generator().manual_seed(1)).tolist()
    batch = Batch.of_ids(ids, answers=[[5, 6]] * 3)
    lens = LensModel.load(wide_pair.base.folder)
    for metric in (SHIPPED["logprob"], replace(SHIPPED["logprob"], answers_only=False)):
        one = work.passes_of(wide_pair, batch, metric, d_vocab=lens.d_vocab)
        reading = Reading.of(metric, batch)
        with torch.no_grad():
            made = _products(lambda reading=reading: reading.logits(lens))
        assert one.work["forward"] == pytest.approx(made, rel=0.03)
        with torch.no_grad():
            whole = _products(lambda: lens(batch.ids, batch.mask))
        both = one.work["forward"] + one.whole_logits["forward"]
        assert both == pytest.approx(whole, rel=0.03)


@pytest.mark.slow
def test_the_products_of_a_weight_node_are_those_that_run(wide_pair, prompts) -> None:
    from tvlens.attribution.sites import weight_path
    from tvlens.attribution.weights import node_rows
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair
    from tvlens.study import work

    _, batch = prompts
    hooked, metric = HookedPair(wide_pair), SHIPPED["logprob"]
    one = work.passes_of(wide_pair, batch, metric, d_vocab=hooked.base.d_vocab)
    reading = hooked.reading(metric, batch)
    with hooked.base.frozen(), weight_path(hooked) as path:
        made = _products(lambda: node_rows(path, reading))
    assert work.weight_node(one)["forward"] == pytest.approx(made, rel=0.1)


def test_seconds_are_amounts_times_rates() -> None:
    from tvlens.study.forecast import seconds_of
    from tvlens.study.work import added, times

    work = added({"row": 3.0, "call": 1.0}, times(2, {"row": 4.0}))
    assert seconds_of(work, {"row": 0.5, "call": 2.0}) == 11 * 0.5 + 2.0


def test_more_prompts_layers_and_nodes_take_longer(wide_pair, prompts) -> None:
    from tvlens.models.metrics import SHIPPED
    from tvlens.study import work
    from tvlens.study.forecast import asked_of, seconds_of

    _, batch = prompts
    asked = asked_of(_plan(), batch, SHIPPED["logprob"])
    one = work.passes_of(wide_pair, batch, SHIPPED["logprob"], d_vocab=500)
    few, many = (
        seconds_of(work.attribute_work(wide_pair, one, asked, nodes=nodes), RATES)
        for nodes in ((8,), (8, 12))
    )
    node = seconds_of(work.weight_node(one), RATES)
    assert many - few == pytest.approx(12 * node)


@pytest.mark.slow
def test_expected_seconds_are_near_the_truth_on_the_demo() -> None:
    """Processor seconds, which do not depend on what else runs; within a factor of 4 anywhere."""
    from tvlens.geometry.classify import classify
    from tvlens.geometry.decompose import decompose
    from tvlens.study.forecast import weights_side
    from tvlens.study.rates import measured_rates
    from tvlens.weights.matching import load_pair

    pair = load_pair("demo:base", "demo:med", scan=False)
    classify(pair, decompose(pair))  # first calls import and plan
    rates = measured_rates(wide=False)
    planned = weights_side(pair, _plan(), rates)
    started = time.process_time()
    weights = decompose(pair)
    between = time.process_time()
    classify(pair, weights)
    for name, taken in (
        ("decompose", between - started),
        ("classify", time.process_time() - between),
    ):
        print(name, planned[name].seconds.expected, taken)
        assert 0.25 < planned[name].seconds.expected / taken < 4, name


# --- memory -------------------------------------------------------------------------------------

PEAK = f"""{WATCH}
from tvlens.geometry.classify import classify
from tvlens.geometry.decompose import decompose
from tvlens.study.inspection import inspection
from tvlens.weights.matching import load_pair
pair = load_pair(*sys.argv[1:], scan=False)
threading.Thread(target=watch, daemon=True).start()
table = decompose(pair)
print(most)
most = 0
classify(pair, table)
print(most)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_near_the_truth(tmp_path: Path) -> None:
    """Anonymous memory, the 100 MB of embedding not held whole; within a factor of 1.5."""
    from tvlens.study.forecast import weights_side
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base", hidden_size=128, vocab_size=200_000)
    tuned = copy_with(base, tmp_path / "tuned", add_noise())
    planned = weights_side(load_pair(base, tuned, scan=False), _plan(), RATES)
    command = [sys.executable, "-c", PEAK, str(base), str(tuned)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, measured in zip(
        ("decompose", "classify"), map(int, done.stdout.split()), strict=True
    ):
        print(name, planned[name].peak, measured)
        assert 1 / 1.5 < planned[name].peak / measured < 1.5, name


def test_matrices_side_by_side_take_less_time_and_more_memory(tmp_path: Path) -> None:
    import torch

    from tvlens.study.forecast import ALONE, weights_side
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base")
    pair = load_pair(base, copy_with(base, tmp_path / "tuned", add_noise()), scan=False)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(weights_side(pair, _plan(), RATES))
    finally:
        torch.set_num_threads(1)
    one, two = found
    for name in ("decompose", "classify"):
        share = two[name].seconds.expected / one[name].seconds.expected
        assert share == pytest.approx((1 + ALONE) / 2)
        assert one[name].peak < two[name].peak < 2 * one[name].peak
    assert two["match"] == one["match"]


# --- a model of 70B -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hollow(tmp_path_factory) -> tuple[Path, Path]:
    from tvlens.demo.models import demo_folder

    root = tmp_path_factory.mktemp("hollow")
    made = hollow_llama(root / "base"), hollow_llama(root / "tuned")
    for folder in made:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy2(demo_folder("base") / name, folder / name)
    return made


@pytest.mark.slow
def test_a_70b_is_inspected_from_its_headers(hollow, monkeypatch) -> None:
    from tvlens.study.inspection import inspection
    from tvlens.weights.sources.folder import Source

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Source, "read", refuse)
    monkeypatch.setattr(Source, "read_rows", refuse)
    monkeypatch.setattr(Source, "sha256", refuse)
    found = inspection(*map(str, hollow), rates=RATES, prompts="demo:med")
    assert found["parameters"] == 70_553_706_496  # Meta's own count
    assert found["bytes"] == {"base": 141_107_412_992, "tuned": 141_107_412_992,
                              "total": 282_214_825_984}  # fmt: skip
    assert found["tensors"] == {"compared": 723}
    weights = found["stages"]["decompose"]["tables"]["weights"]
    assert weights["by"] == {
        "embedding": 2, "norm": 161, "matrix": 560, "head": 4 * 80 * 64, "kv_head": 2 * 80 * 8,
        "neuron": 3 * 80 * 28672,
    }  # fmt: skip
    ig = found["stages"]["attribute"]["tables"]["attribution"]["by"]["weight_ig"]
    assert ig == 28 * (723 + 80 * 72 + 1064) + 80 * 28672
    assert found["stages"]["match"]["bytes_read"] == 3 * 282_214_825_984


@pytest.mark.slow
def test_the_memory_of_a_70b_is_that_of_its_models(hollow) -> None:
    from tvlens.study.inspection import inspection

    found = inspection(*map(str, hollow), rates=RATES, prompts="demo:med")
    peaks = {name: stage["peak_memory_bytes"] for name, stage in found["stages"].items()}
    models = 3 * 4 * 70_553_706_496  # base, tuned, and the base's copy
    assert models < peaks["attribute"] < 1.1 * models
    embeddings = 12 * 2 * 128_256 * 8192  # base, difference, floor of W_E and W_U
    assert embeddings < peaks["decompose"] < 3 * embeddings
    assert peaks["match"] < 1e9


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_inspecting_a_70b_takes_seconds_and_little_memory(hollow) -> None:
    code = (
        "import re, resource, sys; from tvlens import cli; sys.argv[0] = 'tvlens'\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(peak, used.ru_utime + used.ru_stime, file=sys.stderr)"
    )
    words = ["inspect", *map(str, hollow), "--prompts", "demo:med", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 70_553_706_496
    kilobytes, seconds = map(float, done.stderr.split()[-2:])
    print(kilobytes, seconds)
    assert kilobytes * 1024 < 600e6
    assert seconds < 20


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    from tvlens.study.inspection import inspection

    base = hollow_llama(tmp_path / "base", num_hidden_layers=2)
    (base / "model-00002-of-00030.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names the shard 'model-00002-of-00030"):
        inspection(str(base), str(base), rates=RATES)


def test_a_hub_id_that_cannot_be_reached_gives_a_sentence() -> None:
    from tvlens.study.inspection import inspection

    with pytest.raises(CheckpointError, match="there is no folder 'no-such/model-here' here"):
        inspection("no-such/model-here", "demo:med", rates=RATES)


def test_a_stored_copy_of_a_tied_embedding_is_judged_by_a_few_rows(
    tmp_path: Path, monkeypatch
) -> None:
    from tvlens.study.inspection import inspection
    from tvlens.weights.sources.folder import Source

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)

    def with_copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    copied = copy_with(base, tmp_path / "copied", with_copy)
    rows = []
    original = Source.read_rows

    def counted(self, name: str, start: int, stop: int):
        rows.append(stop - start)
        return original(self, name, start, stop)

    monkeypatch.setattr(Source, "read_rows", counted)
    found = inspection(str(base), str(copied), rates=RATES)
    assert found["tensors"]["tied"] == 1
    assert sum(rows) == 2 * 32  # of 64 rows each


# --- prompts ------------------------------------------------------------------------------------


def test_prompts_are_counted_with_the_tokenizer_and_no_model_is_loaded(monkeypatch) -> None:
    from tvlens.models.lens import LensModel
    from tvlens.study.inspection import inspection

    monkeypatch.setattr(LensModel, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    found = inspection("demo:base", "demo:med", rates=RATES, prompts="demo:med")
    from tvlens.demo.models import demo_folder
    from tvlens.models.pair import tokenizer_in
    from tvlens.models.prompts import load_prompts

    tokenizer = tokenizer_in([demo_folder("med")])
    lengths = [
        len(tokenizer(p.prompt)["input_ids"])
        + len(tokenizer(p.answer, add_special_tokens=False)["input_ids"])
        for p in load_prompts("demo:med")
    ]
    prompts = found["prompts"]
    assert (prompts["prompts"], prompts["tokens"]) == (len(lengths), sum(lengths))
    assert prompts["longest"] == max(lengths)
    assert prompts["metric"] == "logit_diff"


def test_without_prompts_the_neutral_texts_are_planned() -> None:
    from tvlens.study.inspection import inspection

    found = inspection("demo:base", "demo:med", rates=RATES)
    assert found["prompts"]["name"] == "neutral"
    assert found["prompts"]["metric"] == "loss"


def test_bad_prompt_lines_are_named_or_left_out_and_counted(tmp_path: Path) -> None:
    from tvlens.study.inspection import inspection

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b", "answer": " c"}\n{"prompt": 3}\n{\n')
    with pytest.raises(PromptError, match=r"2 bad lines: line 2: .*; line 3: not JSON"):
        inspection("demo:base", "demo:med", rates=RATES, prompts=str(path))
    found = inspection("demo:base", "demo:med", rates=RATES, prompts=str(path), skip_bad_lines=True)
    assert found["prompts"]["prompts"] == 1
    assert "2 bad prompt lines are left out: line 2" in found["prompts"]["warnings"][-1]


def test_without_a_tokenizer_attribution_cannot_run_and_the_rest_is_planned(tmp_path: Path) -> None:
    from tvlens.study.inspection import inspection

    base = tiny_llama(tmp_path / "base")
    tuned = copy_with(base, tmp_path / "tuned", add_noise())
    found = inspection(str(base), str(tuned), rates=RATES)
    assert "neither model has a tokenizer" in found["stages"]["attribute"]["cannot_run"]
    assert found["prompts"]["problem"] == found["stages"]["attribute"]["cannot_run"]
    assert found["stages"]["decompose"]["tables"]["weights"]["rows"] > 0


@pytest.mark.slow
def test_all_neurons_have_rows_where_that_is_asked_for() -> None:
    from tvlens.study.inspection import inspection

    top, everything = (
        inspection("demo:base", "demo:med", rates=RATES, prompts="demo:med", neurons=which)
        for which in ("top", "all")
    )
    counts = [
        found["stages"]["attribute"]["tables"]["attribution"]["by"]["weight_ig"]
        for found in (top, everything)
    ]
    assert counts[1] - counts[0] == 28 * (8 * 208 - 1064)


# --- for people ---------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch, capsys) -> Callable[..., str]:
    from tvlens import cli

    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["tvlens", "inspect", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        return out

    return run


@pytest.mark.slow
def test_no_line_is_longer_than_a_terminal(shown, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    tuned = copy_with(base, tmp_path / "tuned", lambda t: t.update(strange=torch.zeros(3)))
    out = shown(base, tuned, "--graft")
    assert max(map(len, out.splitlines())) <= 80
    assert "strange: only_in_tuned" in " ".join(out.split())
    assert "attribute and graft cannot run: neither model has a tokenizer." in " ".join(out.split())


@pytest.mark.slow
def test_the_text_says_what_would_be_read_taken_and_written(shown) -> None:
    out = " ".join(shown("demo:base", "demo:med", "--prompts", "demo:med", "--graft").split())
    assert "28 prompts, 848 tokens (longest 38)" in out
    assert "74 compared, 1 tied" in out
    for word in (
        "match",
        "decompose",
        "classify",
        "attribute",
        "graft",
        "labels 5,130",
        "neuron=4,992",
    ):
        assert word in out


@pytest.mark.slow
def test_several_fine_tunes_are_one_json_list_and_one_is_an_object(shown) -> None:
    several = json.loads(shown("demo:base", "demo:med", "demo:math", "--json"))
    assert [found["tuned"] for found in several] == ["demo:med", "demo:math"]
    assert json.loads(shown("demo:base", "demo:med", "--json"))["tuned"] == "demo:med"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.6, "9.6 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h"),
     (400_000, "4.6 days")],
)  # fmt: skip
def test_times_have_the_unit_that_people_would_use(seconds: float, text: str) -> None:
    from tvlens.reporting.inspected import duration

    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "1.0 kB"), (3.6e6, "3.6 MB"), (141.1e9, "141 GB"), (1.2e12, "1.2 TB")],
)
def test_bytes_have_decimal_units(count: float, text: str) -> None:
    from tvlens.reporting.inspected import amount

    assert amount(count) == text


@pytest.mark.slow
def test_the_rates_are_those_of_the_operations_that_are_counted(pair) -> None:
    from tvlens.study import work
    from tvlens.study.rates import measured_rates

    rates = measured_rates(wide=False)
    assert {*rates} == {*RATES}
    assert all(np.isfinite(rate) and rate >= 0 for rate in rates.values())
    counted = work.added(work.matching_work(pair), work.decompose_work(pair))
    counted = work.added(counted, work.classify_work(pair))
    assert {*counted} <= {*rates}


@pytest.mark.slow
def test_the_tables_of_several_estimators_have_the_rows_that_were_planned(pair, prompts) -> None:
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair
    from tvlens.study.attributing import _attributed
    from tvlens.study.row_counts import attribution_tables, estimate_rows

    asked, batch = prompts
    both = ("first_order", "atp_star")
    made = _attributed(
        _plan(check_exact=17, check_prompts=3, estimators=both),
        HookedPair(pair),
        asked,
        batch,
        SHIPPED["logprob"],
        lambda text: None,
    )
    tables = {table.name: table.to_frame() for table in made.tables}
    frame, options = tables["attribution"], _asked(estimators=both)
    assert dict(estimate_rows(pair, options).by) == (
        frame[frame["estimator"] != "exact"]["method"].value_counts().to_dict()
    )
    for name in ("attribution", "fidelity"):
        planned = attribution_tables(pair, options, joined=True)[name]
        assert planned.at_least <= len(tables[name]) <= planned.at_most, name
    checked = tables["fidelity"]
    assert {"cross_model_first_order", "cross_model_atp_star"} <= set(checked["method"])
    parts = checked[checked["method"] == "cross_model_atp_star"]["part"]
    assert {"q", "k", "z", "post"} <= set(parts)
