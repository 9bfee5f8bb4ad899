"""Each token's share of a pair's gradient, against gradients taken one by one."""

import dataclasses

import numpy as np
import pytest
import torch

from laddpo.core.draws import ElboEstimator
from laddpo.estimator_study.noise import noise_items
from laddpo.estimator_study.tokens import mean_logps, token_shares, token_values
from tests.core.helpers import parameters_of, random_pair, tiny_denoiser


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser()


def test_the_largest_token_is_that_of_gradients_taken_one_by_one(denoiser):
    pairs = [random_pair(np.random.default_rng(3), f"pair-{i}", longest=5) for i in range(2)]
    estimator = ElboEstimator("count", "iid", 3, shared_counts=False)
    parameters = parameters_of(denoiser)
    found = token_shares(denoiser, parameters, pairs, estimator, mean_logps(denoiser, pairs, estimator))
    for pair, row, item in zip(pairs, found, noise_items(pairs, estimator, None), strict=True):
        lengths = {}
        for side, (logps, hidden, weights) in zip(("chosen", "rejected"), token_values(denoiser, item), strict=True):
            for token in range(logps.shape[1]):
                value = (logps * hidden * weights)[:, token].sum()
                parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                lengths[side, token] = sum(float((part**2).sum()) for part in parts if part is not None)
            if side == row["side"]:
                masked = hidden[:, row["position"]]
                mean = logps.detach()[masked, row["position"]].mean()
                assert row["reference_logp"] == pytest.approx(float(mean))
        largest = max(lengths, key=lengths.get)
        assert (row["side"], row["position"]) == largest
        assert row["share"] == pytest.approx(lengths[largest] / sum(lengths.values()))
        assert row["token_id"] == (pair.chosen_ids if largest[0] == "chosen" else pair.rejected_ids)[largest[1]]
        assert row["tokens"] == len(lengths) == len(pair.chosen_ids) + len(pair.rejected_ids)


def test_a_response_that_no_draw_masks_has_no_share(denoiser):
    """One draw of a mask and its inverse may mask nothing."""
    pair = random_pair(np.random.default_rng(3), "pair", longest=2)
    estimator = ElboEstimator("complement", "iid", 1, shared_counts=False)
    for seed in range(40):
        drawn = dataclasses.replace(estimator, seed=seed)
        (item,) = noise_items([pair], drawn, None)
        if not any(len(side[0].draw.masked) for side in item.sides):
            break
    else:
        pytest.fail("no such seed")
    logps = mean_logps(denoiser, [pair], drawn)
    (row,) = token_shares(denoiser, parameters_of(denoiser), [pair], drawn, logps)
    assert row["share"] is None and row["reference_logp"] is None
