"""Metrics of preference training, under TRL's names: means over pairs, standard errors where they are estimates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laddpo.core.gradient import Item
from laddpo.core.objectives import mean_variance, pair_scores, score_variance


def preference_metrics(
    items: Sequence[Item], draws: Tensor, losses: Tensor, beta: float, block: int = 1
) -> dict[str, float]:
    """Means over the pairs of one step or one evaluation.

    Rewards are beta times the ELBO ratio to the reference; without a reference, beta times the ELBO, and there is no
    `kl`. A margin of exactly 0 counts half for the accuracy, so an untrained policy has 0.5. `kl` is the mean over both
    responses of policy minus reference (not a true divergence: the responses are the data's, not the policy's own).
    `elbo/std_error`: of the mean over draws, in nats, from each response's own draws in independent blocks of `block`;
    absent where there is only one block.
    """
    scores = pair_scores(items, draws)
    margins = beta * scores.margin
    metrics = {
        "loss": losses.mean(),
        "rewards/chosen": beta * scores.chosen_ratio.mean(),
        "rewards/rejected": beta * scores.rejected_ratio.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": accuracy(margins).mean(),
        "logps/chosen": scores.policy_chosen.mean(),
        "logps/rejected": scores.policy_rejected.mean(),
    }
    if items[0].reference is not None:
        metrics["kl"] = 0.5 * (scores.chosen_ratio + scores.rejected_ratio).mean()
    if draws.shape[-1] // block > 1:
        metrics["elbo/std_error"] = mean_variance(draws, block).mean().sqrt()
        metrics["score/variance"] = score_variance(items, draws, beta, block).mean()
    return to_floats(metrics)


def accuracy(margins: Tensor) -> Tensor:
    """1 where the chosen response is preferred, 1/2 on a tie. # float64 [items]"""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Bring scalar tensors to the host in one transfer."""
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
