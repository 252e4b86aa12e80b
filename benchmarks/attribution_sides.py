"""What each side of a comparison of attribution does; each runs in an interpreter of its own.

    python benchmarks/attribution_sides.py SIDE BASE TUNED [THREADS]

prints one line of JSON as ``sides.py`` does. Models and prompts are made before the clock starts.
Prompts are random tokens, 31 and an answer of one, each with a corrupt twin of the same length; the
metric is the logit difference of two tokens. Parameters are frozen, backward passes end at
``hook_embed``, results stay tensors.

    nodes             tvlens, first order of every head, neuron and MLP output, clean into corrupt
    host_nodes        TransformerLens's attribution_patch, nodes only, the same prompts and metric
    edges             tvlens, first order of every edge of the residual stream, the same prompts
    passes            two forwards and one backward, nothing else
    one_pass          one forward and one backward, nothing else
    swap_node         one node of the weight integral by swapped weights: heads, neurons, matrices
    gate_node         the same by gates, weights never written
    heads_exact       tvlens, every head of the tuned model into the base, exactly, 4 prompts
    heads_naive       the same, a whole forward for each head
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from sides import Work, report

PROMPTS, EXACT_PROMPTS, TOKENS = 16, 4, 32


class Setting(NamedTuple):
    """Models, prompts and metric, ready."""

    hooked: Any
    batch: Any
    metric: Any


def setting(base: str, tuned: str | None = None, prompts: int = PROMPTS) -> Setting:
    """The pair, or the base against itself where no second model is needed."""
    from tvlens.models.lens import LensModel
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch

    lens = LensModel.load(base)
    other = lens if tuned is None else LensModel.load(tuned)
    draw = torch.Generator().manual_seed(0)

    def tokens(width: int) -> list[list[int]]:
        return torch.randint(0, lens.d_vocab, (prompts, width), generator=draw).tolist()

    batch = Batch.of_ids(
        tokens(TOKENS - 1), answers=tokens(1), wrongs=tokens(1), corrupts=tokens(TOKENS - 1)
    )
    return Setting(HookedPair.of(lens, other), batch, SHIPPED["logit_diff"])


def nodes(base: str, tuned: str) -> Work:
    """First order of heads, neurons and MLP outputs of all prompts at once."""
    from tvlens.attribution.activations import activation_scores
    from tvlens.attribution.directions import question

    hooked, batch, metric = setting(base)
    asked = question(hooked, metric, "clean_into_corrupt", at="base")
    parts = ("z", "post", "mlp_out")

    def work() -> float:
        scores = activation_scores(asked, batch, parts=parts).values
        return sum(float(values.abs().sum()) for values in scores.values())

    return work


def edges(base: str, tuned: str) -> Work:
    """First order of every edge."""
    from tvlens.attribution.directions import question
    from tvlens.attribution.edges import edge_scores

    hooked, batch, metric = setting(base)
    asked = question(hooked, metric, "clean_into_corrupt", at="base")
    return lambda: float(edge_scores(asked, batch).values.abs().sum())


def host_nodes(base: str, tuned: str) -> Work:
    """The host's own function, which takes prompts one at a time."""
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    hooked, batch, _ = setting(base)
    model, answers = hooked.base.model, iter([])
    pairs = [(int(a), int(w)) for a, w in zip(batch.answer_ids, batch.wrong_ids, strict=True)]
    corrupt = torch.stack(batch.corrupt_ids)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        right, wrong = next(answers)
        return (logits[..., -2, right] - logits[..., -2, wrong]).sum()

    def work() -> int:
        nonlocal answers
        answers = (pairs[i % len(pairs)] for i in range(10**9))
        return len(attribution_patch(model, batch.ids, corrupt, metric).node_scores)

    return work


def passes(base: str, tuned: str, forwards: int = 2) -> Work:
    """Forwards, the last with a backward that ends at the embedding."""
    from tvlens.models.lens import leaf

    hooked, batch, metric = setting(base)
    lens, reading = hooked.base, hooked.reading(metric, batch)

    def work() -> float:
        for _ in range(forwards - 1):
            with torch.no_grad():
                reading.value(reading.logits(lens))
        with lens.frozen(), torch.enable_grad(), lens.hooks(fwd=[("hook_embed", leaf)]):
            total = reading.value(reading.logits(lens)).sum()
            total.backward()
        return float(total)

    return work


def swap_node(base: str, tuned: str) -> Work:
    """Weights moved to one place of the path, one forward and backward, every score."""
    from contextlib import ExitStack

    from tvlens.attribution.sites import weight_path

    hooked, batch, metric = setting(base, tuned)
    held = ExitStack()
    held.enter_context(hooked.base.frozen())
    path = held.enter_context(weight_path(hooked))
    return partial(_moved, held, path, hooked.reading(metric, batch))


def _moved(held: Any, path: Any, reading: Any) -> int:
    """What ``swap_node`` times; ``held`` let go, the weights would take gradients again."""
    from tvlens.attribution.weights import node_rows

    path.move(0.3)
    return len(node_rows(path, reading))


def gate_node(base: str, tuned: str) -> Work:
    """Derivatives of every gate at one place of the path."""
    from tvlens.attribution.gates import GatedModel, gate_gradients

    hooked, batch, metric = setting(base, tuned)
    gated = GatedModel.of_pair(hooked)
    reading = gated.reading(metric, batch)

    def work() -> int:
        with gated.lens.frozen():
            return len(gate_gradients(gated, reading, 0.3))

    return work


def heads_exact(base: str, tuned: str) -> Work:
    """Every head's own output patched in."""
    from tvlens.attribution.patching import exact_activations
    from tvlens.components import Component

    hooked, batch, metric = setting(base, tuned, EXACT_PROMPTS)
    lens = hooked.base
    heads = [
        Component("head", layer, head, "z")
        for layer in range(lens.n_layers)
        for head in range(lens.n_heads)
    ]
    return lambda: len(exact_activations(hooked, batch, metric, heads, direction="tuned_into_base"))


def heads_naive(base: str, tuned: str) -> Work:
    """A forward of the whole model and all its logits for each head."""
    hooked, batch, _ = setting(base, tuned, EXACT_PROMPTS)
    receiver, donor = hooked.base.model, hooked.tuned.model
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(hooked.base.n_layers)]

    def patched(z: torch.Tensor, hook: Any, head: int, given: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, :, head] = given[:, :, head]
        return z

    def work() -> int:
        with torch.no_grad():
            _, cache = donor.run_with_cache(batch.ids, names_filter=lambda name: name in names)
            for name in names:
                for head in range(hooked.base.n_heads):
                    hook = partial(patched, head=head, given=cache[name])
                    receiver.run_with_hooks(batch.ids, fwd_hooks=[(name, hook)])
        return len(names) * hooked.base.n_heads

    return work


SIDES: dict[str, Callable[[str, str], Work]] = {
    **{side.__name__: side for side in (nodes, edges, host_nodes, passes)},
    **{side.__name__: side for side in (swap_node, gate_node)},
    "one_pass": partial(passes, forwards=1),
    "heads_exact": heads_exact,
    "heads_naive": heads_naive,
}


if __name__ == "__main__":
    report(SIDES, sys.argv[1:], warm=0 if "heads" in sys.argv[1] else 1)
