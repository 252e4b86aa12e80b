"""Who writes to the residual stream of a model, and who reads from it.

    sources   embed          the stream before the first block
              L3H7.result    what a head writes, z W_O; TransformerLens's hook_result
              L3.attn_out    all of attention, in families that norm what it writes (post-norms)
              L3.b_O         attention's own bias, where there is one
              L3.mlp_out     what an MLP writes, its bias and post-norm included
    targets   L5H2.q_input   the stream as the query of a head reads it
              L5K1.k_input   as a key reads it, of a kv head: stored once, read by its whole group
              L5K1.v_input   as a value reads it
              L5.mlp_in      as an MLP reads it
              logits         as the final norm and the unembedding read it

An *edge* goes from a source to a target that comes after it. The sources before a block sum to
the residual stream there, which ``EdgeGraph.require_sums`` checks on a run, together with what the
targets make of that stream: a family whose blocks do anything else is refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import HostError
from tvlens.models.lens import LensModel

from .nodes import NODES, wide
from .tables import Edge

FIRST_STREAM = "blocks.0.hook_resid_pre"
READERS = (("q", "attn.q", "head"), ("k", "attn.k", "kv_head"), ("v", "attn.v", "kv_head"))
"""What of attention reads the stream: activation, site of its map, kind."""
MLP_MAPS = (("mlp.gate", "pre"), ("mlp.in", "pre_linear"))
"""Maps of a gated MLP that read the stream, and what they make; a plain one has ``mlp.in`` alone,
which makes ``pre``."""
_SUMS = {torch.float32: 1e-3, torch.float64: 1e-6}
_HINT = (
    "Edges are written L0H1.result->L2.mlp_in. Sources are embed, results of heads and mlp_out; "
    "targets q_input of heads, k_input and v_input of kv heads (L2K0), mlp_in and logits, each "
    "after the source."
)
_SUMS_BELOW = 0.05
"""Share of the largest entry by which sums may differ; a forgotten term is as large as the rest."""


class Writer(NamedTuple):
    """Sources whose writes are made of one activation.

    Attributes:
        part: ``z``, or the activation that is written itself.
        layer: Block number, None before the first.
        hook: Where the activation passes.
        places: Their places among the sources.
    """

    part: str
    layer: int | None
    hook: str
    places: slice


class Reader(NamedTuple):
    """Targets of one layer that share a norm and one linear map.

    Attributes:
        hook: Where the gradient of what they make is taken.
        site: The map.
        norm: The norm before it.
        targets: Their places among the targets.
        stream: The hook of the stream that they read.
        seen: How many sources come before them; they are the first ones.
    """

    hook: str
    site: str
    norm: str
    targets: slice
    stream: str
    seen: int


@dataclass(frozen=True, eq=False)
class EdgeGraph:
    """The sources and targets of one architecture, in the order of the forward pass.

    Attributes:
        model: A model of it, whose weights are used.
    """

    model: LensModel

    @cached_property
    def post_normed(self) -> bool:
        """What attention writes is normed, so that heads do not add up."""
        return bool(self.model.host.kept("blocks.0.ln1_post"))

    @cached_property
    def parallel(self) -> bool:
        """MLP and attention of a block read the same stream."""
        return "blocks.0.hook_resid_mid" not in self.model.hook_names

    @cached_property
    def sources(self) -> list[Component]:
        """Everything that writes."""
        found = [Component("node", None, None, "embed")]
        for layer in range(self.model.n_layers):
            found += self._of_attention(layer)
            found.append(Component("node", layer, None, "mlp_out"))
        return found

    @cached_property
    def targets(self) -> list[Component]:
        """Everything that reads."""
        counts = {"head": self.model.n_heads, "kv_head": self.model.n_kv_heads}
        found = []
        for layer in range(self.model.n_layers):
            for name, _, kind in READERS:
                found += [
                    Component(kind, layer, index, f"{name}_input")  # type: ignore[arg-type]
                    for index in range(counts[kind])
                ]
            found.append(Component("node", layer, None, "mlp_in"))
        return [*found, Component("node", None, None, "logits")]

    @cached_property
    def seen(self) -> list[int]:
        """Of every target how many sources come before it; they are the first ones."""
        return [self.reader_of(target).seen for target in range(len(self.targets))]

    @property
    def exists(self) -> Bool[Tensor, "source target"]:
        """Where there is an edge."""
        return torch.arange(len(self.sources))[:, None] < torch.tensor(self.seen)

    @cached_property
    def edges(self) -> list[Edge]:
        """Every edge, source by source."""
        places = self.exists.nonzero().tolist()
        return [Edge(self.sources[u], self.targets[v]) for u, v in places]

    def place(self, edge: Edge) -> tuple[int, int]:
        """Row and column of an edge.

        Raises:
            HostError: The model has no such edge.
        """
        source, target = (known.get(one) for one, known in zip(edge, self._places, strict=True))
        if source is None or target is None or source >= self.seen[target]:
            raise HostError(
                f"this model has no edge from {edge.source} to {edge.target}.", hint=_HINT
            )
        return source, target

    def named(self, edges: Iterable[Edge | Component | str]) -> list[Edge]:
        """Edges that are meant: edges, their keys, or labels such as ``L0H1.result->logits``.

        Raises:
            HostError: The model has no such edge.
        """
        known = {}
        for edge in self.edges:
            known |= dict.fromkeys((edge, edge.component, str(edge.component)), edge)
        found = []
        for edge in edges:
            if edge not in known:
                raise HostError(f"this model has no edge {edge!s}.", hint=_HINT)
            found.append(known[edge])
        return found

    @cached_property
    def readers(self) -> list[Reader]:
        """Queries, keys and values of every layer."""
        found = []
        for layer in range(self.model.n_layers):
            at, start = self._targets_before(layer), 0
            for name, site, kind in READERS:
                count = self.model.n_heads if kind == "head" else self.model.n_kv_heads
                places = slice(at + start, at + start + count)
                hook, block = NODES[name][1].format(layer), f"blocks.{layer}."
                stream, seen = f"{block}hook_resid_pre", self._sources_before(layer)
                found.append(Reader(hook, block + site, f"{block}ln1", places, stream, seen))
                start += count
        return found

    @cached_property
    def mlps(self) -> list[Reader]:
        """The MLP of every layer; its hook is where it writes."""
        found = []
        for layer in range(self.model.n_layers):
            block, attention = f"blocks.{layer}.", 0 if self.parallel else self._attention_count
            at = self._targets_before(layer + 1) - 1
            stream = f"{block}hook_resid_{'pre' if self.parallel else 'mid'}"
            norm = f"{block}ln2" if self._has(f"{block}ln2") else f"{block}ln1"
            seen = self._sources_before(layer) + attention
            found.append(
                Reader(f"{block}hook_mlp_out", f"{block}mlp", norm, slice(at, at + 1), stream, seen)
            )
        return found

    @cached_property
    def in_order(self) -> list[Reader]:
        """All readers of blocks in the order of their targets."""
        return sorted((*self.readers, *self.mlps), key=lambda reader: reader.targets.start)

    @property
    def logits(self) -> Reader:
        """The last reading, of everything, by what no edge goes into but the unembedding."""
        places = slice(len(self.targets) - 1, len(self.targets))
        return Reader("", "unembed", "ln_final", places, self.last_stream, len(self.sources))

    def reader_of(self, target: int) -> Reader:
        """Whose reading a target is."""
        return next(
            reader
            for reader in (*self.in_order, self.logits)
            if target in range(reader.targets.start, reader.targets.stop)
        )

    @property
    def last_stream(self) -> str:
        """The hook of the stream that the logits are made of."""
        return f"blocks.{self.model.n_layers - 1}.hook_resid_post"

    @cached_property
    def streams(self) -> list[str]:
        """Hooks of every stream that is read by a block."""
        return list(dict.fromkeys(reader.stream for reader in self.in_order))

    @cached_property
    def writers(self) -> list[Writer]:
        """Everything that writes, in the order of the pass."""
        found = [Writer("embed", None, FIRST_STREAM, slice(0, 1))]
        attention, count = "attn_out" if self.post_normed else "z", self._attention_count
        for layer in range(self.model.n_layers):
            at = self._sources_before(layer)
            places = {
                attention: slice(at, at + count),
                "mlp_out": slice(at + count, at + count + 1),
            }
            for part, where in places.items():
                found.append(Writer(part, layer, NODES[part][1].format(layer), where))
        return found

    @property
    def written_at(self) -> list[str]:
        """Hooks of what the sources' writes are made of."""
        return [writer.hook for writer in self.writers]

    @property
    def checked_at(self) -> list[str]:
        """Hooks of all that ``require_sums`` looks at."""
        made = [hook for mlp in self.mlps for _, hook in self.maps(mlp)]
        read = [reader.hook for reader in self.readers]
        return list(
            dict.fromkeys([*self.written_at, *self.streams, self.last_stream, *read, *made])
        )

    def written(
        self, model: LensModel, activations: Mapping[str, Tensor]
    ) -> Iterator[tuple[slice, Float[Tensor, "..."]]]:
        """What sources write in a run, [batch, source, pos, d_model], with their places.

        Args:
            model: The model whose run it was: heads write with its W_O.
            activations: At ``written_at``; a scalar 0 stands for a source that is ablated.
        """
        for writer in self.writers:
            yield writer.places, self.written_by(model, writer, activations[writer.hook])

    def written_by(
        self, model: LensModel, writer: Writer, activation: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """What some sources write, [batch, source, pos, d_model]; a scalar activation stays one."""
        activation = wide(activation)
        if activation.ndim == 0:
            return activation
        if writer.part != "z":
            return rearrange(activation, "batch pos d_model -> batch 1 pos d_model")
        kept = model.host.kept(f"blocks.{writer.layer}.attn.o")
        matrix = wide(kept["weight"].canonical(kept["weight"].parameter.detach()))
        pattern = "(head d_head) d_model -> head d_head d_model"
        by_head = rearrange(matrix, pattern, head=activation.shape[2])
        pattern = "batch pos head d_head, head d_head d_model -> batch head pos d_model"
        heads = einsum(activation, by_head, pattern)
        if not self._biased:
            return heads
        bias = wide(kept["bias"].parameter.detach()).expand_as(heads[:, :1])
        return torch.cat([heads, bias], dim=1)

    def maps(self, mlp: Reader) -> list[tuple[str, str]]:
        """The sites by which an MLP reads the stream, and the hooks of what they make."""
        block = mlp.site.removesuffix("mlp")
        if self._has(f"{block}mlp.gate"):
            return [(block + site, f"{block}mlp.hook_{part}") for site, part in MLP_MAPS]
        return [(f"{block}mlp.in", f"{block}mlp.hook_pre")]

    def normed(
        self, name: str, stream: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream behind the norm of a site, by the module that the model runs; differentiable.

        A family without a norm there (OLMo 2) reads the stream as it is.
        """
        module = self.model.host.module(name)
        return stream if module is None else module(stream)

    def weight(self, site: str) -> Float[Tensor, "d_in d_out"]:
        """The map of a site, as x @ W."""
        kept = self.model.host.kept(site)["weight"]
        return wide(kept.canonical(kept.parameter.detach()))

    def made(
        self, site: str, normed: Float[Tensor, "batch pos d_model"], *, of: slice = slice(None)
    ) -> Float[Tensor, "batch pos d_out"]:
        """What the map of a site makes of a normed stream, bias included.

        Args:
            site: The map.
            normed: The stream behind its norm.
            of: The entries that are made, all unless given.
        """
        pattern = "batch pos d_in, d_in d_out -> batch pos d_out"
        made = einsum(wide(normed), self.weight(site)[:, of], pattern)
        bias = self.model.host.kept(site).get("bias")
        return made if bias is None else made + wide(bias.canonical(bias.parameter.detach()))[of]

    def made_of_head(
        self, reader: Reader, number: int, stream: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_head"]:
        """One head's query, key or value, of the stream as that head reads it."""
        width = self.model.d_head
        part = slice(number * width, (number + 1) * width)
        return self.made(reader.site, self.normed(reader.norm, stream), of=part)

    @torch.no_grad()
    def require_sums(self, activations: Mapping[str, Tensor]) -> None:
        """Check on a run of the model that sources sum to streams and targets read these.

        Args:
            activations: At ``checked_at``.

        Raises:
            HostError: They do not: this family's blocks do something else.
        """
        sums, total = {}, torch.zeros(())
        for places, written in self.written(self.model, activations):
            for number in range(places.start, places.stop):
                total = total + written[:, number - places.start]
                sums[number + 1] = total
        self._require_alike(self.last_stream, sums[len(self.sources)], activations)
        for reader in self.in_order:
            self._require_alike(reader.stream, sums[reader.seen], activations)
        for reader in self.readers:
            normed = self.normed(reader.norm, activations[reader.stream])
            self._require_alike(reader.hook, self.made(reader.site, normed), activations)
        for mlp in self.mlps:
            normed = self.normed(mlp.norm, activations[mlp.stream])
            for site, hook in self.maps(mlp):
                self._require_alike(hook, self.made(site, normed), activations)

    def _require_alike(self, hook: str, ours: Tensor, activations: Mapping[str, Tensor]) -> None:
        theirs = wide(activations[hook]).flatten(2)
        allowed = _SUMS.get(activations[hook].dtype, _SUMS_BELOW) * float(theirs.abs().max())
        if float((ours.flatten(2) - theirs).abs().max()) > allowed:
            raise HostError(
                f"edges cannot be told apart in this model: what is written does not add up to "
                f"what is read at {hook!r}.",
                hint="Its blocks scale, norm or route the residual stream in a way that edges do "
                "not know. Nodes are not affected.",
            )

    def _of_attention(self, layer: int) -> list[Component]:
        if self.post_normed:
            return [Component("node", layer, None, "attn_out")]
        heads = [Component("head", layer, i, "result") for i in range(self.model.n_heads)]
        return [*heads, *([Component("bias", layer, None, "b_O")] if self._biased else [])]

    @cached_property
    def _places(self) -> tuple[dict[Component, int], dict[Component, int]]:
        """Places of sources and of targets."""
        rows, columns = (
            {component: place for place, component in enumerate(ends)}
            for ends in (self.sources, self.targets)
        )
        return rows, columns

    @cached_property
    def _biased(self) -> bool:
        return "bias" in self.model.host.kept("blocks.0.attn.o")

    @cached_property
    def _attention_count(self) -> int:
        return len(self._of_attention(0))

    def _sources_before(self, layer: int) -> int:
        return 1 + layer * (self._attention_count + 1)

    def _targets_before(self, layer: int) -> int:
        return layer * (self.model.n_heads + 2 * self.model.n_kv_heads + 1)

    def _has(self, site: str) -> bool:
        return bool(self.model.host.kept(site))
