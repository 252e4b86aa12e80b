"""Continuations with a cache against the plain loop, and what ends them."""

import pytest
import torch

from . import attribution_pairs as pairs

PROMPTS = ([3, 4, 5], [7], [9, 8, 7, 6, 5, 4], [11, 12])


def lens(family="llama"):
    from tvlens.models.lens import LensModel

    return LensModel.of(pairs.hf_model(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_the_cache_gives_what_running_whole_texts_gives(family):
    from tvlens.models.generation import _transformers_model, continued, looped

    model = lens(family)
    assert _transformers_model(model) is not None
    made = continued(model, PROMPTS, max_new_tokens=6, rows=3)
    assert made == looped(model, PROMPTS, 6, frozenset())
    assert all(len(one.ids) == 6 and not one.ended for one in made)


def test_a_stop_token_ends_a_text_and_is_not_part_of_it():
    from tvlens.models.generation import continued, looped

    model = lens()
    whole = continued(model, PROMPTS, max_new_tokens=8)
    stop = whole[0].ids[2]
    made = continued(model, PROMPTS, max_new_tokens=8, stop=[stop])
    assert made == looped(model, PROMPTS, 8, frozenset([stop]))
    for before, after in zip(whole, made, strict=True):
        place = before.ids.index(stop) if stop in before.ids else len(before.ids)
        assert after.ids == before.ids[:place]
        assert after.ended == (stop in before.ids)


def test_the_other_prompts_of_a_pass_change_nothing():
    from tvlens.models.generation import continued

    model = lens()
    together = continued(model, PROMPTS, max_new_tokens=5)
    alone = [continued(model, [prompt], max_new_tokens=5)[0] for prompt in PROMPTS]
    assert together == alone


def test_a_model_that_only_makes_logits_continues_too():
    from tvlens.models.generation import Continuation, continued

    class Counter:
        def logits_at(self, ids, mask, positions):
            last = ids.gather(1, positions)
            return torch.nn.functional.one_hot((last + 1) % 10, 10).float()

    made = continued(Counter(), [[1], [6, 7]], max_new_tokens=4, stop=[9])
    assert made == [Continuation([2, 3, 4, 5], False), Continuation([8], True)]
