"""Kept keys and values against the full computation: exact where nothing kept has changed."""

import numpy as np
import pytest
import torch

from laddpo.evaluation.sampling import SamplerSettings, generate
from laddpo.models.block_cache import BlockCache
from laddpo.models.llada import LLaDAConfig
from laddpo.models.loading import new_model

MASK, STOP = 39, 38


@pytest.fixture(scope="module", params=[4, 2], ids=["all heads", "grouped heads"])
def model(request):
    shape = {"d_model": 32, "n_heads": 4, "n_kv_heads": request.param, "n_layers": 3, "mlp_hidden_size": 48}
    return new_model(LLaDAConfig(**shape, vocab_size=40, mask_token_id=MASK), seed=4).double()


def prompts(count=5):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 37, size=3 + i % 3).astype(np.int32) for i in range(count)]


def sample(model, items, **settings):
    settings = {"gen_length": 12, "steps": 12, "block_length": 4, "stop_early": False, **settings}
    return np.stack(generate(model, items, SamplerSettings(**settings), MASK, [STOP]))


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.7}, {"temperature": 0.8}, {"suppress_eos": True}])
def test_one_step_a_block_gives_the_tokens_of_the_full_computation(model, kind, options):
    plain = sample(model, prompts(), steps=3, **options)
    assert np.array_equal(sample(model, prompts(), steps=3, block_cache=kind, **options), plain)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@torch.no_grad()
def test_a_step_that_follows_no_change_has_the_hidden_states_of_the_full_computation(model, kind):
    """Nothing was committed since the cache was filled, so every stored key is what it would be now."""
    items = [torch.as_tensor(p).long() for p in prompts()]
    answers = torch.randint(0, 37, (5, 12), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 4, 8, 4, 0])
    cache = BlockCache(model, items, 12, 4, kind)
    first = cache.hidden(torch.arange(5), answers, starts, torch.ones(5, dtype=torch.bool))
    again = cache.hidden(torch.arange(5), answers, starts, torch.zeros(5, dtype=torch.bool))
    some = cache.hidden(torch.tensor([3, 1]), answers[[3, 1]], starts[[3, 1]], torch.tensor([False, True]))
    for i, (prompt, answer, start) in enumerate(zip(items, answers, starts, strict=True)):
        ids = torch.cat([prompt, answer])
        whole = model.packed_hidden_states(ids, torch.arange(len(ids)), [len(ids)])
        wanted = whole[len(prompt) + start : len(prompt) + start + 4]
        torch.testing.assert_close(first[i], wanted, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(again[i], wanted, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(some, first[[3, 1]], atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_dual_keeps_what_follows_the_block_and_prefix_computes_it_anew(model):
    """After a change behind the block, "prefix" sees it and "dual" does not; neither sees one before the block."""
    items = [torch.as_tensor(prompts(1)[0]).long()]
    answers = torch.full((1, 12), 5)
    starts, one = torch.tensor([4]), torch.tensor([0])
    behind, before = answers.clone(), answers.clone()
    behind[0, 10], before[0, 1] = 7, 7
    for kind, sees_behind in (("prefix", True), ("dual", False)):
        cache = BlockCache(model, items, 12, 4, kind)
        first = cache.hidden(one, answers, starts, torch.tensor([True]))
        assert torch.allclose(cache.hidden(one, before, starts, torch.tensor([False])), first, atol=1e-12)
        changed = not torch.allclose(cache.hidden(one, behind, starts, torch.tensor([False])), first, atol=1e-6)
        assert changed == sees_behind, kind


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("options", [{}, {"confidence_threshold": 0.06}, {"stop_early": True}])
def test_an_answer_does_not_depend_on_its_batch(model, kind, options):
    together = sample(model, prompts(), block_cache=kind, **options)
    alone = np.concatenate([sample(model, [item], block_cache=kind, **options) for item in prompts()])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_every_position_is_written(model, kind):
    answers = sample(model, prompts(), block_cache=kind, confidence_threshold=0.1)
    assert answers.shape == (5, 12) and MASK not in answers
