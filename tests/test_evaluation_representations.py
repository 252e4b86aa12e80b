"""Representations of tiny pairs: against plain passes with all tokens kept, and planted changes."""

import dataclasses

import numpy as np
import pytest
import torch

from . import attribution_pairs as pairs
from .test_evaluation_similarity import moments_of

MODULES = {
    "llama": ("model.embed_tokens", "model.layers", "self_attn", "o_proj"),
    "gpt2": ("transformer.wte", "transformer.h", "attn", "c_proj"),
    "neox": ("gpt_neox.embed_in", "gpt_neox.layers", "attention", "dense"),
}
"""The embedding, the blocks, their attention, and what reads its heads."""
LENGTHS = (9, 6, 11, 7, 4, 12, 8, 5, 10, 3)
HEADS = 4


def documents(side="right", start=None):
    """Documents of different lengths; ``start`` is put before each."""
    from tvlens.models import Batch

    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(1, 38, (n,), generator=generator).tolist() for n in LENGTHS]
    return Batch.of_ids([[start, *row] if start else row for row in rows], side=side)


def kept(rows, place, module, args, out):
    """A hook that keeps what goes in (``place`` in) or comes out, of one document."""
    found = args[0] if place == "in" else out[0] if isinstance(out, tuple) else out
    rows.append(found[0].double())


def all_tokens(model, family, batch):
    """Every activation of every token, [document][token, width], read without padding."""
    from functools import partial

    embed, blocks, attention, reader = MODULES[family]
    places = {("embed", None): (embed, "out")}
    for layer in range(2):
        block = f"{blocks}.{layer}"
        places |= {
            ("resid_post", layer): (block, "out"),
            ("attn_out", layer): (f"{block}.{attention}", "out"),
            ("mlp_out", layer): (f"{block}.mlp", "out"),
            ("z", layer): (f"{block}.{attention}.{reader}", "in"),
        }
    seen = {key: [] for key in places}
    handles = [
        model.get_submodule(name).register_forward_hook(partial(kept, seen[key], place))
        for key, (name, place) in places.items()
    ]
    with torch.no_grad():
        for row, length in enumerate(batch.lengths.tolist()):
            begin = int(batch.starts[row])
            model(batch.ids[row : row + 1, begin : begin + length])
    for handle in handles:
        handle.remove()
    return {key: [rows.numpy() for rows in found] for key, found in seen.items()}


def plain_pair(family, change=pairs.noised):
    base, tuned = pairs.hf_model(family), pairs.hf_model(family)
    change(tuned)
    return base, tuned


def compared(pair, batch, **options):
    from tvlens.evaluation.representations import compared

    found = compared(pair.base, pair.tuned, batch, **options)
    return {(one.site.part, one.site.layer, one.tokens): one for one in found}


@pytest.fixture(scope="module")
def llama():
    return pairs.hooked_pair("llama")


@pytest.fixture(scope="module")
def found(llama):
    return compared(llama, documents())


@pytest.mark.slow
@pytest.mark.parametrize("family", MODULES)
def test_streamed_measures_are_those_of_all_tokens_of_plain_passes(family):
    from tvlens.evaluation.similarity import similarity

    batch = documents()
    found = compared(pairs.hooked_pair(family), batch)
    base, tuned = (all_tokens(model, family, batch) for model in plain_pair(family))
    assert {key[:2] for key in found} == set(base)
    for (part, layer, tokens), one in found.items():
        skip = int(tokens == "without_first")
        rows = [
            np.concatenate([document[skip:] for document in model[part, layer]])
            for model in (base, tuned)
        ]
        assert one.count == len(rows[0]) == sum(LENGTHS) - skip * len(LENGTHS)
        assert one.documents == len(LENGTHS)
        heads = HEADS if part == "z" else 1
        for head, columns in enumerate(zip(*(np.split(x, heads, 1) for x in rows), strict=True)):
            wanted = similarity(moments_of(*columns))
            for name, value in wanted.values.items():
                got = float(one.similarity.values[name][head])
                assert got == pytest.approx(float(value), rel=2e-3, abs=1e-5), (part, layer, name)
            inner = (columns[0] * columns[1]).sum(1)
            cosine = inner / np.linalg.norm(columns[0], axis=1) / np.linalg.norm(columns[1], axis=1)
            assert one.cosines[head].value == pytest.approx(cosine.mean(), rel=1e-5)


def test_the_cosines_interval_is_a_bootstrap_over_documents(llama, found):
    from tvlens.evaluation.intervals import Values, interval

    batch = documents()
    base, tuned = (all_tokens(model, "llama", batch) for model in plain_pair("llama"))
    cosines = [
        (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        for x, y in zip(base["resid_post", 1], tuned["resid_post", 1], strict=True)
    ]
    items = np.repeat(np.arange(len(cosines)), [len(one) for one in cosines])
    flat = np.concatenate(cosines)
    wanted = interval(Values(items, flat, np.ones(len(flat))))
    got = found["resid_post", 1, "all"].cosines[0]
    assert got == pytest.approx(wanted, rel=1e-6)
    assert got.low < got.value < got.high


@pytest.mark.slow
def test_passes_padding_and_memory_change_nothing(llama, found, monkeypatch):
    from tvlens.evaluation import representations

    monkeypatch.setattr(representations, "ROWS_AT_ONCE", 3)
    for batch, memory in ((documents(), 1), (documents("left"), 2**31)):
        other = compared(llama, batch, memory=memory)
        assert list(other) == list(found)
        for key, one in found.items():
            assert (other[key].count, other[key].documents) == (one.count, one.documents)
            for name, value in one.similarity.values.items():
                torch.testing.assert_close(
                    other[key].similarity.values[name], value, rtol=1e-3, atol=1e-5
                )
            for mine, theirs in zip(one.cosines, other[key].cosines, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5)


def test_sites_are_read_together_as_far_as_memory_goes(llama):
    from tvlens.attribution.nodes import activation_sites
    from tvlens.evaluation.representations import PARTS, _groups, bytes_needed

    sites = activation_sites(llama.base, PARTS)
    each = 48 * 32**2
    assert bytes_needed(llama.base, sites) == 7 * each + 2 * 48 * HEADS * 8**2
    groups = list(_groups(llama.base, sites, 3 * each))
    assert [site for group in groups for site in group] == sites
    assert max(bytes_needed(llama.base, group) for group in groups) == 3 * each
    assert [len(group) for group in _groups(llama.base, sites, 1)] == [1] * len(sites)


def test_a_model_is_itself(llama):
    from tvlens.evaluation.representations import compared

    for one in compared(llama.base, llama.base, documents()):
        values = one.similarity.values
        assert set(one.similarity.status) == {"unchanged"}
        assert values["effective_rank"].tolist() == [0.0] * len(one.cosines)
        assert values["cka"].tolist() == pytest.approx([1.0] * len(one.cosines), abs=1e-12)
        assert [cosine.value for cosine in one.cosines] == pytest.approx([1.0] * len(one.cosines))


def test_a_change_that_is_written_in_three_directions_has_rank_three():
    def change(model):
        generator = torch.Generator().manual_seed(2)
        left, right = (
            torch.randn(32, 3, generator=generator),
            torch.randn(3, 24, generator=generator),
        )
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight += 0.05 * left @ right

    found = compared(pairs.hooked_pair("llama", change), documents())
    for part in ("mlp_out", "resid_post"):
        one = found[part, 1, "without_first"].similarity
        assert one.status == ("few_tokens",)  # 65 of 32 dimensions
        assert float(one.values["effective_rank"]) <= 3
        assert float(one.shares[0, 2]) > 1e-3
        assert float(one.shares[0, 3:].sum()) < 1e-8
    for key in (("resid_post", 0), ("attn_out", 1), ("embed", None), ("z", 1)):
        assert set(found[*key, "all"].similarity.status) == {"unchanged"}, key


def test_a_rotated_residual_stream_keeps_its_cka_and_not_its_cosine():
    """Read at the embedding, whose rows are rotated; the model that follows is another one."""

    def change(model):
        turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turn)

    one = compared(pairs.hooked_pair("llama", change), documents())["embed", None, "all"]
    assert float(one.similarity.values["cka"]) == pytest.approx(1, abs=1e-6)
    assert abs(one.cosines[0].value) < 0.5


@pytest.mark.slow
def test_a_change_at_the_first_token_alone_is_left_out_and_would_decide_otherwise():
    def noise(model):
        pairs.noised(model, scale=0.2)

    def sink(model):
        noise(model)
        with torch.no_grad():
            model.model.embed_tokens.weight[39] += 100.0

    batch = documents(start=39)
    plain, sunk = (compared(pairs.hooked_pair("llama", c), batch) for c in (noise, sink))
    ranks = {
        (name, tokens): float(found["embed", None, tokens].similarity.values["effective_rank"])
        for name, found in (("plain", plain), ("sunk", sunk))
        for tokens in ("without_first", "all")
    }
    assert ranks["sunk", "without_first"] == ranks["plain", "without_first"] > 10
    assert ranks["plain", "all"] > 10
    assert ranks["sunk", "all"] < 1.01


def test_zero_activations_are_alike_where_both_are_zero():
    from tvlens.evaluation.representations import _cosines

    x = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]]])
    y = torch.tensor([[[6.0, 8.0]], [[0.0, 0.0]], [[0.0, 0.0]], [[-1.0, 0.0]]])
    assert _cosines(x, y).flatten().tolist() == pytest.approx([1, 1, 0, -1])


def test_the_table_has_a_row_a_component_set_of_tokens_and_measure(found):
    from tvlens.evaluation.representation_tables import Named, representations_table
    from tvlens.evaluation.similarity import UNITS

    named = Named("base", "med", "random 2 for med", "random", 1, heads_per_kv=2)
    frame = representations_table(list(found.values()), named).to_frame()
    assert len(frame) == (1 + 2 * (3 + HEADS)) * 2 * len(UNITS)
    assert not frame.duplicated(["component", "tokens", "measure"]).any()
    assert set(frame["kind"]) == {"node", "head"}
    for name in ("base", "tuned", "model", "control"):
        assert (frame[name] == getattr(named, name)).all()
    assert (frame["draw"] == 1).all()
    assert frame.groupby("measure")["unit"].first().to_dict() == dict(UNITS)
    head = frame[(frame["component"] == "L1H3.z") & (frame["tokens"] == "all")]
    assert head[["site", "layer", "index", "kv_index", "part", "width"]].iloc[0].tolist() == [
        *("L1H3", 1, 3, 1, "z", 8)
    ]
    by_measure = head.set_index("measure")
    one = found["z", 1, "all"]
    for name, values in one.similarity.values.items():
        assert by_measure.loc[name, "value"] == float(values[3])
    assert by_measure.loc["cosine", "value"] == one.cosines[3].value
    assert by_measure["ci_low"].notna().tolist() == [name == "cosine" for name in UNITS]
    assert (by_measure.loc["overlap", "k"], by_measure.loc["overlap", "chance"]) == (1, 1 / 8)
    spectrum = by_measure.loc["effective_rank", "spectrum"]
    assert spectrum.tolist() == one.similarity.shares[3].tolist()
    assert set(frame["n_tokens"]) == {75, 65}


def test_a_node_keeps_no_more_than_the_leading_shares(found):
    from tvlens.evaluation.representation_tables import SPECTRUM, Named, representations_table

    one = found["resid_post", 0, "all"]
    wide = torch.cat([one.similarity.shares, torch.zeros(1, 9)], 1)
    wider = dataclasses.replace(one, similarity=dataclasses.replace(one.similarity, shares=wide))
    frame = representations_table([wider], Named("base", "med", "med")).to_frame()
    (kept_shares,) = frame["spectrum"].dropna()
    assert len(kept_shares) == SPECTRUM == 32
    assert frame["control"].isna().all()
    assert frame["draw"].isna().all()


def test_models_are_left_as_found_also_after_an_exception(llama, monkeypatch):
    from tvlens.evaluation import representations

    def state():
        modules = [m for lens in (llama.base, llama.tuned) for m in lens.model.modules()]
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]

    before = state()
    monkeypatch.setattr(representations, "_cosines", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compared(llama, documents())
    assert state() == before


def test_what_cannot_be_compared_is_refused(llama):
    from tvlens.errors import HostError, IncomparableModelsError, PromptError
    from tvlens.models import Batch

    with pytest.raises(PromptError, match="two tokens or more"):
        compared(llama, Batch.of_ids([[3], [4]]))
    with pytest.raises(HostError, match="no activation 'resid'"):
        compared(llama, documents(), parts=["resid"])
    other = pairs.hooked_pair("llama")
    other.tuned.n_layers = 3
    with pytest.raises(IncomparableModelsError, match="n_layers is 2 in the base, 3"):
        compared(other, documents())
    other.base.model.train()
    with pytest.raises(HostError, match="training mode"):
        compared(other, documents())
