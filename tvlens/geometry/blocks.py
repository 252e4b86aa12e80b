"""One pass over the blocks of one or several pairs that share a base.

A matrix is read, measured and dropped before the next one is read; the four matrices of an
attention layer are held together, because circuits need two of them. With several threads a few
such groups, of one block or of two, are measured at the same time. What belongs to the base alone,
its singular directions above all, is worked out once for all pairs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tvlens.components import (
    KNOWN_PARTS,
    READING_PARTS,
    Component,
    Pieces,
    columns_of_pieces,
    key_columns,
)
from tvlens.errors import StudyError
from tvlens.memory import release_freed
from tvlens.tables import Table, concatenated
from tvlens.threads import Map, side_by_side

from .changes import Change, Factored, transposed
from .embedding_evidence import embedding_evidence
from .evidence import GATE_COLUMNS, Evidence, Keys, joined_evidence, untested
from .head_evidence import HeadChanges, head_evidence
from .heads import (
    ColumnProducts,
    Coordinates,
    Factor,
    circuit_energies,
    circuit_sums,
    column_products,
    coordinates,
    cores_of,
    slices_of_heads,
)
from .input_evidence import head_rows, matrix_rows, neuron_rows, with_rows
from .input_null import InputMoment, MatrixInputs
from .matrices import Basis, Products, Seen, products_of, seen, spectral_basis
from .matrix_evidence import MatrixChange, matrix_evidence
from .measures import (
    HEAD_PARTS,
    KV_PARTS,
    NEURON_PARTS,
    SIDED_COLUMNS,
    Columns,
    Spectra,
    Tokens,
    Writer,
    circuit_columns,
    pieces_of,
    placed_columns,
    ranks,
    spectral_columns,
    vocabularies,
)
from .neuron_evidence import NeuronChanges, neuron_evidence
from .neurons import Sums, change_of_neurons, rows_of_neurons
from .norm_evidence import NormChange
from .nulls import Peers, Signs, peers_of, spans_of
from .reading import Inputs, Layout, Pair, Slice, factor_of_heads, kv_index_of, slice_of

Progress = Callable[[int, int], None]
"""Called as ``progress(blocks done, blocks in all)``."""
Circuit = tuple[str, str, str]
"""A circuit and the parts of its left and right factor."""
SEEDS_OF_CIRCUIT = 2
"""Draws of signs for one circuit."""
CIRCUITS: tuple[Circuit, ...] = (("OV", "W_V", "W_O"), ("QK", "W_Q", "W_K"))


@dataclass(frozen=True, eq=False)
class Ask:
    """What is to be found in one block of one pair.

    Attributes:
        pair: Base and tuned checkpoint.
        block: The components of interest.
        spectra: Whose singular values.
        seed: Seed of the null models, None where no evidence is wanted; it needs both spectra.
        covariances: What the base's matrices read, None where that is unknown.
    """

    pair: Pair
    block: Sequence[Component]
    spectra: Spectra = "both"
    seed: int | None = None
    covariances: Inputs | None = None


@dataclass(frozen=True, eq=False)
class Findings:
    """What a pass found of one pair.

    Attributes:
        weights: Rows of the table ``weights``.
        evidence: Evidence about the same components, None where none was asked for.
        norms: Changes of norms, which are judged when those of all layers are known.
    """

    weights: Table
    evidence: Evidence | None
    norms: Sequence[NormChange] = ()


def joined_findings(parts: Sequence[Findings]) -> Findings:
    """The findings of several blocks, in order."""
    weights = concatenated("weights", [part.weights for part in parts], order="relative_delta")
    evidence = [part.evidence for part in parts if part.evidence is not None]
    norms = [norm for part in parts for norm in part.norms]
    return Findings(weights, joined_evidence(evidence) if evidence else None, norms)


@dataclass(frozen=True, eq=False)
class BaseMatrix:
    """What several fine-tunes share of one matrix, each worked out when it is first needed.

    Attributes:
        base: Base weights.
        part: Which matrix it is.
        n_heads: Heads that it is cut into, 0 for none.
        moment: Second moment of what it reads, None where that is unknown.
        draws: Signs by their seed.
    """

    base: Float[Tensor, "d_in d_out"]
    part: str
    n_heads: int
    moment: Float[Tensor, "d_in d_in"] | None = None
    draws: dict[int, Signs] = field(default_factory=dict)

    def signs(self, seed: int) -> Signs:
        """The draws of a seed, the same for every change of the base."""
        return self.draws.setdefault(seed, Signs(seed))

    @cached_property
    def basis(self) -> Basis:
        """Its singular directions."""
        return spectral_basis(self.base)

    @cached_property
    def heads(self) -> Basis:
        """Those of each head's slice."""
        return spectral_basis(slices_of_heads(self.base, self.part, self.n_heads))

    @cached_property
    def spans(self) -> Float64[Tensor, "head d_model span"]:
        """Orthonormal bases of what each head's slice reads or writes of the residual stream."""
        slices = slices_of_heads(self.base, self.part, self.n_heads)
        return spans_of(slices if self.part == "W_O" else transposed(slices))

    @cached_property
    def inputs(self) -> MatrixInputs | None:
        """What the null of its inputs needs."""
        if self.moment is None:
            return None
        return MatrixInputs(InputMoment.of(self.moment), self.base, self.basis)

    @cached_property
    def peers(self) -> Peers:
        """The directions of its neurons."""
        return peers_of(rows_of_neurons(self.base, self.part))


class AttentionMatrix(NamedTuple):
    """One of the matrices that circuits are made of."""

    base: BaseMatrix
    weight: Slice


Place = tuple[int, int]
"""Where rows stand in their block: disjoint components, slices of matrices, circuits, neurons."""
WHOLE, SLICES, CIRCUIT, NEURONS = range(4)


@dataclass(frozen=True, eq=False)
class _Block:
    """One block of one pair while it is measured.

    Attributes:
        writer: Makes rows.
        ask: What is to be found.
        layer: The layer of its matrices, None for embeddings and the final norm.
        kv_index: The kv head that each query head reads.
        circuits: Those that the attention computes.
        rows: Tables by their place.
        evidence: The same of evidence.
        norms: The same of changes of norms.
    """

    writer: Writer
    ask: Ask
    layer: int | None
    kv_index: Int[Tensor, " head"]
    circuits: Sequence[Circuit]
    rows: dict[Place, Table] = field(default_factory=dict)
    evidence: dict[Place, Evidence] = field(default_factory=dict)
    norms: dict[Place, NormChange] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Another draw in every layer."""
        return (self.ask.seed or 0) + 1000 * (0 if self.layer is None else self.layer + 1)

    def place_of(self, component: Component) -> Place:
        """Where the row of a disjoint component stands."""
        return (WHOLE, list(self.ask.block).index(component))

    def n_heads(self, part: str) -> int:
        """Heads that a matrix is cut into, 0 for none."""
        if part not in HEAD_PARTS or not len(self.kv_index):
            return 0
        return int(self.kv_index.max()) + 1 if part in KV_PARTS else len(self.kv_index)

    def add(self, place: Place, keys: Keys, columns: Columns, weight: Slice | None) -> Keys:
        """Keep rows, and return what evidence says of which components it is about."""
        self.rows[place] = self.writer.table(keys, columns, weight)
        tied = [weight is not None and weight.tied] * len(keys["component"])
        return {**keys, "tied": tied, **{name: columns[name] for name in GATE_COLUMNS}}

    def taken(self) -> Findings:
        """All rows in the order of the table; they are no longer kept here."""
        tables, parts = _taken(self.rows), _taken(self.evidence)
        weights = concatenated("weights", tables, order="relative_delta")
        return Findings(weights, joined_evidence(parts) if parts else None, _taken(self.norms))


Kept = TypeVar("Kept")


def _taken(kept: dict[Place, Kept]) -> list[Kept]:
    """All that is kept, in the order of the table; nothing is left."""
    return [kept.pop(place) for place in sorted(kept)]


class _Task(NamedTuple):
    """Components that are in memory together, and the pairs in which they are measured."""

    group: Sequence[Component]
    states: Sequence[_Block]


def findings_of_block(asks: Sequence[Ask]) -> list[Findings]:
    """The findings in the same block of several pairs; what belongs to one base is shared."""
    return next(_findings_of_blocks([asks], map))


def findings_of_blocks(
    blocks: Sequence[Sequence[Ask]], progress: Progress | None = None
) -> list[list[Findings]]:
    """The same of several blocks, a few groups of components at a time.

    An embedding takes longest and cannot be shared out, so that its block begins first.
    """
    order = sorted(range(len(blocks)), key=lambda number: not _has_embedding(blocks[number]))
    found: dict[int, list[Findings]] = {}
    with side_by_side() as run:
        done = _findings_of_blocks([blocks[number] for number in order], run)
        for count, (number, of_block) in enumerate(zip(order, done, strict=True), start=1):
            found[number] = of_block
            release_freed()
            if progress is not None:
                progress(count, len(blocks))
    return [found[number] for number in range(len(blocks))]


def _findings_of_blocks(blocks: Sequence[Sequence[Ask]], run: Map) -> Iterator[list[Findings]]:
    states = [[_started(ask) for ask in asks] for asks in blocks]
    groups = [list(_groups(asks)) for asks in blocks]
    pairs = list(zip(states, groups, strict=True))
    done = run(_measure, [_Task(group, some) for some, own in pairs for group in own])
    for some, own in pairs:
        for _ in own:
            next(done)
        yield [state.taken() for state in some]


def _has_embedding(asks: Sequence[Ask]) -> bool:
    return any(component.kind == "embedding" for ask in asks for component in ask.block)


def _measure(task: _Task) -> None:
    first = task.group[0]
    if first.kind == "embedding":
        _measure_embedding(first, [state for state in task.states if first in state.ask.block])
        return
    kept: dict[Component, BaseMatrix] = {}
    for state in task.states:
        _measure_group([c for c in task.group if c in state.ask.block], kept, state)


def _started(ask: Ask) -> _Block:
    pair = ask.pair
    layer = next((c.layer for c in ask.block if c.kind == "matrix"), None)
    writer = Writer(pair.base_name, pair.tuned_name)
    return _Block(writer, ask, layer, kv_index_of(pair), circuits_of(pair.layout))


def circuits_of(layout: Layout) -> Sequence[Circuit]:
    """The circuits that a model's attention computes, each with the two factors it needs.

    Queries and keys that are normalised before they meet are no bilinear form.
    """
    return CIRCUITS[:1] if layout.qk_norm else CIRCUITS


def _groups(asks: Sequence[Ask]) -> Iterator[Sequence[Component]]:
    """Components that are in memory together."""
    block = list(dict.fromkeys(component for ask in asks for component in ask.block))
    attention = [c for c in block if c.kind == "matrix" and c.part in HEAD_PARTS]
    if attention:
        yield attention
    yield from ([component] for component in block if component not in attention)


def _measure_group(
    group: Sequence[Component], kept: dict[Component, BaseMatrix], state: _Block
) -> None:
    attention: dict[str, AttentionMatrix] = {}
    for component in group:
        weight, part = slice_of(state.ask.pair.read(component)), component.part or ""
        if component.kind != "matrix":
            columns = pieces_of(weight, part).grouped(1).columns()
            _keep_untested(component, columns, weight, state)
            continue
        base = _base_matrix(kept, component, weight, state)
        _measure_matrix(component, base, weight, state)
        if base.n_heads:
            attention[part] = AttentionMatrix(base, weight)
    for number, circuit in enumerate(state.circuits):
        if {*circuit[1:]} <= attention.keys():
            _measure_circuit(circuit, number, attention, state)


def _base_matrix(
    kept: dict[Component, BaseMatrix], component: Component, weight: Slice, state: _Block
) -> BaseMatrix:
    """What is known of the base already, if it is the same base."""
    found, part = kept.get(component), component.part or ""
    if found is None or not torch.equal(found.base, weight.base):
        moment = _moment_of(component, weight, state.ask)
        found = BaseMatrix(weight.base, part, state.n_heads(part), moment)
        kept[component] = found
    return found


def _moment_of(component: Component, weight: Slice, ask: Ask) -> Tensor | None:
    """The second moment of what a matrix reads, where evidence is wanted and it is known.

    Raises:
        StudyError: It is that of another model.
    """
    if ask.covariances is None or ask.seed is None:
        return None
    moment = ask.covariances.of(component)
    if moment is not None and len(moment) != len(weight.base):
        raise StudyError(
            f"the covariances hold {len(moment)} inputs of {component}, which reads "
            f"{len(weight.base)}.",
            hint="Take them on the base of the pair.",
        )
    return moment


def _keep_untested(component: Component, columns: Columns, weight: Slice, state: _Block) -> Keys:
    place = state.place_of(component)
    keys = state.add(place, key_columns([component]), _oriented(component, columns), weight)
    if state.ask.seed is not None:
        state.evidence[place] = untested(keys)
        if component.kind == "norm" and isinstance(weight.change, Tensor):
            state.norms[place] = NormChange(keys, weight.base.double(), weight.change.double())
    return keys


def _oriented(component: Component, columns: Columns) -> Columns:
    """Without what means nothing where the orientation is unknown."""
    if component.part in KNOWN_PARTS:
        return columns
    return {name: values for name, values in columns.items() if name not in SIDED_COLUMNS}


def _measure_embedding(component: Component, states: Sequence[_Block]) -> None:
    """Its rows and evidence in all pairs; each reads the same tokens at the same time."""
    asked = [
        Tokens(
            state.ask.pair.slabs(component),
            state.ask.spectra,
            None if state.ask.seed is None else state.seed,
        )
        for state in states
    ]
    for found, state in zip(vocabularies(asked, component.part or ""), states, strict=True):
        keys = _keep_untested(component, found.columns, found.weight, state)
        whole = found.sums.grouped(1)
        if state.ask.seed is not None and bool(whole.delta > 0) and bool(whole.base > 0):
            state.evidence[state.place_of(component)] = embedding_evidence(keys, found)


def _measure_matrix(component: Component, base: BaseMatrix, weight: Slice, state: _Block) -> None:
    """A matrix's row, and those of its heads or neurons, with the evidence about them."""
    pieces, spectral = pieces_of(weight, base.part), _spectral(base, weight.change, state)
    place, whole = state.place_of(component), pieces.grouped(1)
    columns: Columns = {**whole.columns(), **spectral.columns}
    keys = state.add(place, key_columns([component]), _oriented(component, columns), weight)
    testable = bool(whole.delta > 0) and bool(whole.base > 0)
    if state.ask.seed is not None:
        state.evidence[place] = untested(keys)
        if testable and spectral.found is not None:
            one = MatrixChange(
                *(base.base, weight.change, base.basis, spectral.found, spectral.products),
                *(base.part, base.signs(state.seed)),
            )
            left = float(whole.residual / whole.delta)
            found = matrix_evidence(keys, one, left)
            known = [] if base.inputs is None else matrix_rows(keys, one, base.inputs)
            state.evidence[place] = with_rows(found, known)
    if base.n_heads:
        _measure_heads(base, weight, pieces, state)
    if base.part in NEURON_PARTS:
        _measure_neurons(base, weight, pieces, state, testable=testable)


@dataclass(frozen=True, eq=False)
class _Spectral:
    columns: Columns
    found: Seen | None = None
    products: Products | None = None


def _spectral(base: BaseMatrix, change: Change, state: _Block) -> _Spectral:
    """The measures of a matrix that its singular values are needed for."""
    spectra = state.ask.spectra
    if spectra == "none":
        return _Spectral({})
    if spectra == "delta":
        return _Spectral(spectral_columns(change))
    products = None if isinstance(change, Factored) else products_of(base.basis, change)
    found = seen(base.basis, change, products)
    columns = spectral_columns(change, products, basis=base.basis)
    shape = (base.base.shape[0], base.base.shape[1])
    columns |= placed_columns(base.basis, found, base.part, shape=shape)
    return _Spectral(columns, found, products)


def _measure_heads(base: BaseMatrix, weight: Slice, pieces: Sums, state: _Block) -> None:
    """Rows of the slices of one attention matrix."""
    columns: Columns = {**pieces.grouped(base.n_heads).columns()}
    if state.ask.spectra != "none":
        change = factor_of_heads(weight, base.part, base.n_heads).delta
        columns |= _head_spectra(base, change, state.ask.spectra)
    of_kv = base.part in KV_PARTS
    pieces_cut = Pieces("kv_head" if of_kv else "head", state.layer, base.part, base.n_heads)
    kv_index = list(range(base.n_heads)) if of_kv else state.kv_index.tolist()
    keys = columns_of_pieces(pieces_cut, kv_index=kv_index)
    state.add((SLICES, HEAD_PARTS.index(base.part)), keys, columns, weight)


def _head_spectra(base: BaseMatrix, change: Change, spectra: Spectra) -> Columns:
    if spectra == "delta":
        return spectral_columns(change)
    products = None if isinstance(change, Factored) else products_of(base.heads, change)
    found = seen(base.heads, change, products)
    shape = (change.shape[-2], change.shape[-1])
    columns = spectral_columns(change, products, basis=base.heads)
    return columns | placed_columns(base.heads, found, base.part, shape=shape)


def _measure_circuit(
    circuit: Circuit, number: int, parts: Mapping[str, AttentionMatrix], state: _Block
) -> None:
    """The rows of OV or QK, and the evidence about them."""
    name, first, second = circuit
    pieces = Pieces("head", state.layer, name, len(state.kv_index))
    keys = columns_of_pieces(pieces, kv_index=state.kv_index.tolist())
    if state.ask.spectra != "both":
        one, two = (
            _columns_of_circuit(parts[part].weight, part, state, column_products)
            for part in (first, second)
        )
        columns: Columns = {**circuit_sums(one, two).measures().columns()}
        if state.ask.spectra == "delta":
            columns |= ranks("delta", circuit_energies(one, two))
        state.add((CIRCUIT, number), keys, columns, None)
        return
    left, right = (
        _columns_of_circuit(parts[part].weight, part, state, coordinates)
        for part in (first, second)
    )
    d_model, d_head = parts[first].weight.base.shape[0], left.base.shape[2]
    columns = circuit_columns(cores_of(left, right), name, d_model=d_model, d_head=d_head)
    keys = state.add((CIRCUIT, number), keys, columns, None)
    if state.ask.seed is None:
        return
    one, two = (_factor_of_circuit(parts[part].weight, part, state) for part in (first, second))
    two = two.swapped if name == "QK" else two
    spans = tuple(_spans_of_circuit(parts[part].base, state) for part in (first, second))
    partners = state.ask.pair.rotary_partners if name == "QK" else range(d_head)
    partner = torch.tensor(list(partners))
    heads = HeadChanges(name, one, two, left, right, spans, state.kv_index, partner)
    seed = state.seed + SEEDS_OF_CIRCUIT * number
    found = head_evidence(keys, heads, seed=seed)
    known = parts[first].base.inputs
    rows = [] if known is None else head_rows(keys, heads, known.inputs)
    state.evidence[CIRCUIT, number] = with_rows(found, rows)


def _factor_of_circuit(weight: Slice, part: str, state: _Block) -> Factor:
    """One factor of a circuit, one slice a query head."""
    factor = factor_of_heads(weight, part, state.n_heads(part))
    return factor.of_heads(state.kv_index) if part in KV_PARTS else factor


def _spans_of_circuit(base: BaseMatrix, state: _Block) -> Float64[Tensor, "head d_model span"]:
    """What each query head reads or writes through one factor of a circuit."""
    return base.spans[state.kv_index] if base.part in KV_PARTS else base.spans


FactorColumns = TypeVar("FactorColumns", Coordinates, ColumnProducts)


def _columns_of_circuit(
    weight: Slice, part: str, state: _Block, found: Callable[[Factor], FactorColumns]
) -> FactorColumns:
    """What is ``found`` of one factor of a circuit, one slice a query head."""
    factor = factor_of_heads(weight, part, state.n_heads(part))
    columns = found(factor.swapped if part == "W_O" else factor)
    return columns.of_heads(state.kv_index) if part in KV_PARTS else columns


def _measure_neurons(
    base: BaseMatrix, weight: Slice, pieces: Sums, state: _Block, *, testable: bool
) -> None:
    place = (NEURONS, NEURON_PARTS.index(base.part))
    neurons = Pieces("neuron", state.layer, base.part, len(pieces.base))
    keys = state.add(place, columns_of_pieces(neurons), {**pieces.columns()}, weight)
    if state.ask.seed is None:
        return
    if not testable:
        state.evidence[place] = untested(keys)
        return
    rows, changes = (
        rows_of_neurons(base.base, base.part),
        change_of_neurons(weight.change, base.part),
    )
    shared = (base.basis, base.peers, base.part, base.signs(state.seed))
    cut = NeuronChanges(rows, changes, pieces, *shared)
    found, known = neuron_evidence(keys, cut), []
    if base.inputs is not None and base.part in READING_PARTS:
        known = neuron_rows(keys, cut, base.inputs.inputs)
    state.evidence[place] = with_rows(found, known)
