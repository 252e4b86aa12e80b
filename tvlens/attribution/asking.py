"""The three questions in one call each: what estimates say, what is so, what little suffices.

    attribute   estimated scores of everything, weights or activations
    patch       the same quantity exactly, for chosen components
    graft       the smallest set of components that carries the change

Prompts may be a prompt set, a file's name or token ids; a metric a name, a function, a ``Metric``
or None, which chooses by the prompts. All scores have one sign: above 0, the metric is higher
because the component is tuned rather than base.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from tvlens.components import Component, key_columns
from tvlens.errors import HostError, PromptError, SelectionError
from tvlens.models.metrics import Metric, resolve_metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch, Prompt, PromptSet, load_prompts, tokenised
from tvlens.selection import parse_selection
from tvlens.tables import Table, concatenated

from . import grafting
from .activations import attribute_activations
from .circuits import circuit_scores, circuit_table
from .edge_graph import EdgeGraph
from .edge_patching import exact_edges
from .edges import attribute_edges
from .exact import ExactMethod, exact_weight_table
from .exchanges import EDGE_ESTIMATORS
from .gates import GatedModel, gated_weight_scores
from .layer_integrals import layer_integrals
from .nodes import DEFAULT_PARTS, NODES, all_parts
from .parts import part_scores, part_table
from .patching import exact_activations
from .sites import all_components, counts, weight_sites
from .tables import Direction, Edge, cut_components
from .weights import METHODS, NODE_COUNTS, method_run, weight_scores, weight_table

Space = Literal["weight", "activation", "edge"]
Prompts = PromptSet | Batch | str | Path | None
AnyMetric = str | Metric | Callable[..., Tensor] | None
EXTRAS = ("parts", "circuits")
"""Further divisions of the scores of weights."""


def attribute(
    hooked: HookedPair,
    prompts: Prompts,
    metric: AnyMetric = None,
    *,
    space: Space = "weight",
    estimator: str = "",
    direction: str = "",
    at: str = "",
    activations: Sequence[str] = DEFAULT_PARTS,
    also: Sequence[str] = (),
) -> Table:
    """Estimated scores of every component on every prompt.

        tv.attribute(hooked, "demo:med")                            # weights, integrated
        tv.attribute(hooked, prompts, "logprob", estimator="first_order", at="base")
        tv.attribute(hooked, prompts, space="activation")           # the tuned model's into base
        tv.attribute(hooked, prompts, space="activation", direction="clean_into_corrupt", at="base")
        tv.attribute(hooked, prompts, space="edge")                 # from where to where
        tv.attribute(hooked, prompts, also=("parts", "circuits"))   # and how the scores divide

    What is not said is chosen: in weight space integrated gradients along the line from base to
    tuned, whose scores sum to the change of the metric; in activation space first order, the tuned
    model's activations into the base. Only scores of disjoint kinds of ``weight_ig`` may be added.

    Args:
        hooked: The two models; left bit for bit as they were.
        prompts: Prompts, a prompt file, ``demo:NAME``, token ids, or None for the neutral texts.
        metric: What is attributed; None chooses by the prompts.
        space: ``weight``: where it was written. ``activation``: where it passes. ``edge``: from
            which component to which other one.
        estimator: ``ig`` or ``first_order``. Of activations also ``qk_fix``, ``atp_star`` and
            ``ig_inputs`` (gradients along the line between a prompt and its corrupt prompt), and
            ``ig`` exchanges a layer's whole activation along a straight line. Of edges
            ``first_order`` and ``ig_inputs``.
        direction: What is put where: ``tuned_into_base``, ``base_into_tuned``; of activations
            also those within one model (``attribution.directions``).
        at: Where gradients are taken: ``base``, ``tuned``, of an integral ``path``.
        activations: Which activations (``attribution.nodes``); weights have none.
        also: Of weights, ``parts``: the division over geometric parts (rows with
            ``geometric_part``); ``circuits``: OV and QK of every query head.

    Returns:
        The table ``attribution``; ``top(k)``, ``where(...)`` and ``to_frame()`` read it.

    Raises:
        PromptError: The prompts cannot be read, or lack what the direction needs.
        MetricError: There is no such metric, or its gradient vanishes where it would be taken.
        HostError: The models cannot be attributed to in this way.
        ValueError: Space, estimator, direction and place do not go together.
    """
    batch, chosen = asked_batch(hooked, prompts), asked_metric(metric, prompts)
    if unknown := [extra for extra in also if extra not in EXTRAS]:
        raise ValueError(f"also: expected some of {EXTRAS}, got {unknown[0]!r}.")
    if space == "weight":
        method = _weight_method(estimator, direction, at)
        return _weights(hooked, batch, chosen, method, also)
    if also:
        raise ValueError(f"{also[0]} divide scores of weights; activations have none.")
    way = _activation_way(direction)
    if space == "edge":
        return _edges(hooked, batch, chosen, way, at, estimator)
    if estimator == "ig":
        integrals = layer_integrals(
            hooked, batch, chosen, direction=way, at=at, parts=activations
        )  # fmt: skip
        return integrals.table()
    how: dict[str, Any] = {"estimator": estimator} if estimator else {}
    return attribute_activations(
        hooked, batch, chosen, direction=way, at=at, parts=activations, **how
    )


def patch(
    hooked: HookedPair,
    prompts: Prompts,
    metric: AnyMetric = None,
    components: Sequence[Component | Edge] | str = "",
    *,
    space: Space = "weight",
    direction: str = "",
    at: str = "",
    nodes: int = NODE_COUNTS[0],
) -> Table:
    """The exact effect of exchanging chosen components, one at a time, in the estimates' sign.

        tv.patch(hooked, prompts, "logprob", "L3H7,L5.W_out")          # what weight_ig estimates
        tv.patch(hooked, prompts, "logprob", "L3H7", at="base")        # alone into the base
        tv.patch(hooked, prompts, "logprob", "L3H7", at="tuned")       # alone out of the tuned
        tv.patch(hooked, prompts, "logprob", 'part == "mlp_out"', space="activation")
        tv.patch(hooked, prompts, "logprob", "L0H1.result->L2.mlp_in", space="edge")

    Args:
        hooked: The two models; left bit for bit as they were.
        prompts: As for ``attribute``.
        metric: As for ``attribute``.
        components: Components, or a selection: names as tables print them, or an expression over
            the key's columns. A name of a head or neuron alone is its output where activations are
            patched. Edges are named one by one, with commas between.
        space: Weights, activations or edges.
        direction: Of weights, ``tuned_into_base`` or ``base_into_tuned``; of activations any.
        at: Of weights, ``path`` averages what the exchange does over the line from base to tuned,
            ``base`` inserts alone, ``tuned`` removes alone; of activations within one model, which.
        nodes: Quadrature nodes of ``path``.

    Returns:
        The table ``attribution`` with one row for every component and prompt.

    Raises:
        SelectionError: The selection cannot be read or names nothing.
        HostError: The models run below float32, or a component has nothing to exchange.
        ValueError: Direction and place do not go together.
    """
    batch, chosen = asked_batch(hooked, prompts), asked_metric(metric, prompts)
    if space == "edge":
        named = components.split(",") if isinstance(components, str) else components
        edges = EdgeGraph(hooked.base).named(
            one.strip() if isinstance(one, str) else one for one in named
        )
        way = _activation_way(direction)
        return exact_edges(hooked, batch, chosen, edges, direction=way, at=at)
    wanted = _chosen(hooked, components, space)  # type: ignore[arg-type]
    if space == "weight":
        method: ExactMethod = _matching("exact", direction, at, preferred="exact_weight_path")  # type: ignore[assignment]
        return exact_weight_table(hooked, batch, chosen, wanted, method=method, nodes=nodes)
    way = _activation_way(direction)
    return exact_activations(hooked, batch, chosen, wanted, direction=way, at=at)


def graft(
    hooked: HookedPair,
    prompts: Prompts,
    metric: AnyMetric = None,
    *,
    keep: float = 0.9,
    seed: int = 0,
) -> grafting.Graft:
    """The smallest set of components whose tuning vectors restore the change, and destroy it.

        found = tv.graft(hooked, "demo:med", keep=0.9)
        found.facts["graft"]["restored"]["sentence"]; found.sets.top(10); found.curves

    Chosen on the prompts of the split ``choose``, judged on ``judge``, beside sets ranked by length
    and random ones of equal length. Every value is a forward pass.

    Args:
        hooked: The two models; left bit for bit as they were.
        prompts: Prompts with their splits; as for ``attribute`` but not token ids.
        metric: As for ``attribute``.
        keep: Share of the change to restore or to destroy.
        seed: Of random sets and of the bootstrap.

    Raises:
        PromptError: A split has no prompt.
        StudyError: The metric does not change on ``choose``.
    """
    if isinstance(prompts, Batch):
        raise PromptError(
            "token ids have no splits to choose and to judge on.",
            hint="Give prompts, or call tvlens.attribution.grafting.graft with rows of each.",
        )
    asked = _prompt_set(prompts)
    batch, chosen = asked_batch(hooked, asked), asked_metric(metric, asked)
    splits = {
        split: [row for row, number in enumerate(batch.numbers) if asked[number].split == split]
        for split in ("choose", "judge")
    }
    gated = GatedModel.of_pair(hooked)
    scores = gated_weight_scores(gated, batch, chosen)
    names = (hooked.base_name, hooked.tuned_name)
    return grafting.graft(
        gated, batch, chosen, scores, **splits, keep=keep, seed=seed, names=names
    )  # fmt: skip


def asked_batch(hooked: Any, prompts: Prompts) -> Batch:
    """The prompts as token ids of both models; the chat template is used if there is one.

    Raises:
        PromptError: They cannot be read or tokenised.
        HostError: There is no tokenizer, or ``hooked`` is no hooked pair.
    """
    if not isinstance(hooked, HookedPair):
        raise HostError(
            f"expected a HookedPair, got {type(hooked).__name__}.",
            hint="tv.HookedPair(tv.load_pair(BASE, TUNED)) runs both models.",
        )
    if isinstance(prompts, Batch):
        return prompts
    return tokenised(_prompt_set(prompts), hooked.tokenizer)


def asked_metric(metric: AnyMetric, prompts: Prompts) -> Metric:
    """The metric that is meant, by the prompts where None.

    Raises:
        MetricError: There is none of that name, or the prompts lack what it needs.
    """
    asked = _fields_of(prompts) if isinstance(prompts, Batch) else _prompt_set(prompts)
    return resolve_metric(metric, asked)


def _prompt_set(prompts: PromptSet | str | Path | None) -> PromptSet:
    return prompts if isinstance(prompts, PromptSet) else load_prompts(prompts)


def _fields_of(batch: Batch) -> PromptSet:
    """Prompts that have the fields that token ids have."""
    filled = ["text" if len(ids) else None for ids in batch.answer_ids]
    wrongs = ["text" if len(ids) else None for ids in batch.wrong_ids]
    rows = zip(filled, wrongs, strict=True)
    return PromptSet(
        tuple(Prompt("text", answer=answer, wrong=wrong) for answer, wrong in rows), "token ids"
    )


def _weight_method(estimator: str, direction: str, at: str) -> str:
    estimator = estimator or ("ig" if at in ("", "path") else "first_order")
    return _matching(estimator, direction, at, preferred="weight_ig")


def _matching(estimator: str, direction: str, at: str, *, preferred: str) -> str:
    """The method in weight space that has these, where they are said."""
    fits = {
        method: known
        for method, known in METHODS.items()
        if all(
            said in ("", has) for said, has in zip((estimator, direction, at), known, strict=True)
        )
    }
    if not fits:
        there = "; ".join(f"{e}, {d} at {a}" for e, d, a in METHODS.values())
        raise ValueError(
            f"weights have no {estimator} {direction or 'in any direction'} at {at or 'any place'};"
            f" there are: {there}."
        )
    return preferred if preferred in fits else next(iter(fits))


def _activation_way(direction: str) -> Direction:
    return direction or "tuned_into_base"  # type: ignore[return-value]


def _weights(
    hooked: HookedPair, batch: Batch, metric: Metric, method: str, also: Sequence[str]
) -> Table:
    estimator, _, at = METHODS[method]
    scores = weight_scores(hooked, batch, metric, estimator=estimator, at=at)  # type: ignore[arg-type]
    tables = [weight_table(scores, hooked, batch, metric)]
    status = "incomplete" if scores.incomplete else "ok"
    run = method_run(method, hooked, batch, metric, nodes=scores.nodes, status=status)
    if "parts" in also:
        tables.append(part_table(part_scores(hooked, batch, metric, scores), run))
    if "circuits" in also:
        tables.append(circuit_table(circuit_scores(hooked, batch, metric, scores), run))
    return concatenated("attribution", tables, order="score")


def _edges(
    hooked: HookedPair, batch: Batch, metric: Metric, way: Direction, at: str, estimator: str
) -> Table:
    if estimator not in ("", *EDGE_ESTIMATORS):
        raise ValueError(f"edges have no {estimator}; there are {', '.join(EDGE_ESTIMATORS)}.")
    how: dict[str, Any] = {"estimator": estimator} if estimator else {}
    return attribute_edges(hooked, batch, metric, direction=way, at=at, **how)


def _chosen(
    hooked: HookedPair, components: Sequence[Component] | str, space: Space
) -> list[Component]:
    """The components that are meant.

    Raises:
        SelectionError: A selection names nothing that can be exchanged.
    """
    if not isinstance(components, str):
        return list(components)
    lens = hooked.base
    if space == "weight":
        there = all_components(lens, weight_sites(lens))
    else:
        there = _activation_components(hooked)
    selection = parse_selection(components)
    rows = key_columns(there)
    found = [
        component
        for place, component in enumerate(there)
        if selection.accepts({name: values[place] for name, values in rows.items()})
    ]
    named = {*selection.names}
    if space == "activation" and named:  # a head's or neuron's name alone is its output
        found = [c for c in found if c.part in DEFAULT_PARTS or str(c) in named]
    missing = named - {c.site for c in found} - {str(c) for c in found}
    if missing or not found:
        raise SelectionError(
            f"the selection {components!r} names nothing in {space} space"
            + (f": {', '.join(sorted(missing))}." if missing else "."),
            hint="Names are those of the columns component and site of the attribution table.",
        )
    return found


def _activation_components(hooked: HookedPair) -> list[Component]:
    lens = hooked.base
    indices = {str(kind): count for kind, count in counts(lens).items()}
    found = []
    for part in all_parts(lens):
        cut, _ = NODES[part]
        layers = lens.n_layers if cut.layered else 1
        found += cut_components(cut, layers, indices.get(cut.kind, 1))
    return found
