"""Metrics and variance estimates of preference steps, against values derived by hand and against simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import Item
from laddpo.core.losses import LOSSES, LossOptions
from laddpo.core.metrics import accuracy, preference_metrics, to_floats
from laddpo.core.objectives import (
    DpoObjective,
    SftObjective,
    loss_std_error,
    mean_variance,
    pair_scores,
    score_variance,
)
from tests.core.helpers import random_ids

# Two pairs, two draws each side. # [pairs, sides, draws]
POLICY = torch.tensor([[[-4.0, -6.0], [-9.0, -9.0]], [[-2.0, -2.0], [-1.0, -3.0]]], dtype=torch.float64)
REFERENCE = np.array([[[-6.0, -8.0], [-8.0, -8.0]], [[-2.0, -2.0], [-1.0, -3.0]]])


@pytest.fixture
def items() -> list[Item]:
    """Chosen of 2 and 4 tokens, rejected of 3 and 1."""
    rng, e = np.random.default_rng(0), ElboEstimator("count", diffusion_samples=2)
    lengths = ((2, 3), (4, 1))
    return [
        Item(
            f"{i}",
            tuple(e.sequences(f"{i}", "s", random_ids(rng, 1), random_ids(rng, n), range(2)) for n in sides),
            ref,
        )
        for i, (sides, ref) in enumerate(zip(lengths, REFERENCE, strict=True))
    ]


def test_scores_are_means_over_draws(items):
    scores = pair_scores(items, POLICY)
    assert scores.policy_chosen.tolist() == [-5, -2] and scores.policy_rejected.tolist() == [-9, -2]
    assert scores.reference_chosen.tolist() == [-7, -2] and scores.reference_rejected.tolist() == [-8, -2]
    assert scores.chosen_tokens.tolist() == [2, 4] and scores.rejected_tokens.tolist() == [3, 1]
    assert scores.margin.tolist() == [3, 0]


def test_the_losses_of_items_are_weighted_and_know_their_target_margins(items):
    """Scores 1.5 and 0: 3 * log(1 + e^(1 - 1.5)) and log 2."""
    items[0] = replace(items[0], weight=3.0, margin=1.0)
    losses = DpoObjective("sigmoid", LossOptions(beta=0.5)).losses(items, POLICY)
    assert losses.tolist() == pytest.approx([3 * math.log1p(math.exp(-0.5)), math.log(2)], rel=1e-14)


def test_metrics_are_those_derived_by_hand(items):
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64)
    metrics = preference_metrics(items, POLICY, losses, beta=0.5)
    # chosen: variances of the two means 2/2 and 0; rejected: 0 and 2/2; mean 1/2
    # score: draws of the margin 3, 3 and 0, 0
    assert metrics == {
        "loss": 1.5,
        "rewards/chosen": 0.5 * (2 + 0) / 2,
        "rewards/rejected": 0.5 * (-1 + 0) / 2,
        "rewards/margins": 0.5 * (3 + 0) / 2,
        "rewards/accuracies": 0.75,  # right, and a tie
        "logps/chosen": -3.5,
        "logps/rejected": -5.5,
        "kl": 0.5 * (2 - 1 + 0 + 0) / 2,
        "elbo/std_error": pytest.approx(math.sqrt(0.5)),
        "score/variance": 0.0,
    }
    assert all(type(value) is float for value in metrics.values())


def test_the_objective_sees_means_and_lengths(items):
    sigmoid = DpoObjective("sigmoid", LossOptions(beta=0.5, sft_weight=0.1)).losses(items, POLICY)
    assert sigmoid.tolist() == pytest.approx([math.log1p(math.exp(-1.5)) + 0.1 * 5 / 2, math.log(2) + 0.1 * 2 / 4])
    assert SftObjective().losses(items, POLICY).tolist() == [5 / 2, 2 / 4]


def test_draw_errors_are_absent_where_a_single_block_cannot_show_them(items):
    losses = torch.zeros(2, dtype=torch.float64)
    assert {"elbo/std_error", "score/variance"}.isdisjoint(preference_metrics(items, POLICY, losses, 0.5, block=2))
    one = [Item(item.id, item.sides, item.reference[:, :1]) for item in items]
    for block in (1, 2):
        assert "score/variance" not in preference_metrics(one, POLICY[..., :1], losses, 0.5, block)


def test_a_tie_is_half_right():
    assert accuracy(torch.tensor([2.0, 0.0, -0.0, -1e-300], dtype=torch.float64)).tolist() == [1.0, 0.5, 0.5, 0.0]


def test_variance_of_the_mean_treats_a_block_as_one_observation():
    draws = torch.tensor([[1.0, 3.0, 5.0, 7.0, 100.0]])
    # blocks (1, 3) and (5, 7): means 2 and 6, variance 8, of their mean 4; the unpaired 100 is left out
    assert mean_variance(draws, block=2).tolist() == [4.0]
    assert mean_variance(draws[:, :4]).tolist() == pytest.approx([20 / 3 / 4])
    assert mean_variance(draws[:, :2], block=2).isnan().all()
    assert mean_variance(draws[:, :1], block=2).isnan().all()


def test_score_variance_is_that_of_beta_times_the_margin(items):
    rng = torch.Generator().manual_seed(0)
    policy = POLICY + torch.randn(POLICY.shape, generator=rng, dtype=torch.float64)
    ratio = policy - torch.from_numpy(REFERENCE)
    margins = 0.5 * (ratio[:, 0] - ratio[:, 1])
    torch.testing.assert_close(score_variance(items, policy, 0.5), margins.var(dim=1) / 2)


def test_the_variance_estimate_has_the_true_variance_as_its_mean():
    """20,000 pairs of 4 blocks of correlated draws whose mean has variance 1/4 of a block's."""
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randn(20_000, 4, 1, generator=draw, dtype=torch.float64)
    draws = (blocks + 0.3 * torch.tensor([-1.0, 1.0])).flatten(1)  # within a block the noise cancels
    estimated, true = mean_variance(draws, block=2).mean().item(), draws.mean(dim=1).var().item()
    assert estimated == pytest.approx(0.25, rel=0.03) and true == pytest.approx(0.25, rel=0.03)


def test_floats_keep_their_names():
    assert to_floats({"b": torch.tensor(1.5), "a": torch.tensor(2, dtype=torch.int64)}) == {"b": 1.5, "a": 2.0}


@pytest.mark.parametrize("loss", [name for name, row in LOSSES.items() if row.takes_pairs])
@pytest.mark.parametrize("sft_weight", [0.0, 2.0])
def test_the_losses_standard_error_is_the_spread_that_other_masks_would_give(loss, sft_weight):
    """Simulated: 400 steps of 3 pairs of 16 draws, whose masks move policy and reference alike, their ratio little."""
    options = LossOptions(beta=0.4, sft_weight=sft_weight, label_smoothing=0.1 * (loss == "exo_pair"), dpop_lambda=1.0)
    objective, draw = DpoObjective(loss, options), torch.Generator().manual_seed(0)
    e, rng = ElboEstimator("count", diffusion_samples=16), np.random.default_rng(0)
    sequences = tuple(e.sequences("p", side, random_ids(rng, 1), random_ids(rng, 4), range(16)) for side in "ab")
    reference_mean = torch.tensor([-8.0, -9.0], dtype=torch.float64)
    policy_mean = reference_mean + torch.tensor([[1.0, -0.5], [0.2, 0.4], [-0.6, -2.0]], dtype=torch.float64)
    losses, errors = [], []
    for _ in range(400):
        common, own = (torch.randn(3, 2, 16, generator=draw, dtype=torch.float64) for _ in range(2))
        reference = reference_mean[:, None] + 2 * common
        policy = policy_mean[..., None] + 2 * common + 0.3 * own
        items = [Item("p", sequences, values.numpy()) for values in reference]
        losses.append(objective.losses(items, policy).mean().item())
        errors.append(loss_std_error(objective, items, policy))
    # the spread of 400 values is known to 3.5%
    assert np.mean(np.square(errors)) ** 0.5 == pytest.approx(np.std(losses), rel=0.12)


def test_the_losses_standard_error_needs_two_blocks(items):
    objective = DpoObjective("sigmoid", LossOptions(beta=0.5))
    assert loss_std_error(objective, items, POLICY) is not None
    assert loss_std_error(objective, items, POLICY, block=2) is None
