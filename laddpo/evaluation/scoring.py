"""Log-likelihoods of preference pairs under the base and the tuned model, with the margins that evaluate measures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.gradient import Item
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective, mean_variance
from laddpo.core.tasks import pair_item
from laddpo.inputs.both_models import BASE, TUNED, BothModels
from laddpo.inputs.margins import PreferenceScores, evaluation_estimator, score_windows
from laddpo.preference.encoding.encode import EncodedCompletion, EncodedPair


def score_pairs(
    both: BothModels,
    pairs: Sequence[EncodedPair],
    diffusion_samples: int,
    seed: int,
    beta: float,
    token_budget: int | TokenBudget,
) -> list[dict[str, Any]]:
    """One record per pair, in nats. The draws are those of `evaluate`: equal pairs, seed and number give equal values.

    Both models see the same masks. Margins need a tuned model; without one they are None.
    """
    estimator = evaluation_estimator(diffusion_samples, seed, both.loaded.block_length)
    draws = estimator.draw_indices(0)
    items = [pair_item(pair, estimator, draws) for pair in pairs]
    values = _values(both, items, token_budget)
    policy = values[both.names[-1]]
    columns = {
        "id": [pair.id for pair in pairs],
        "logps_chosen": policy[:, 0].mean(-1).tolist(),
        "logps_rejected": policy[:, 1].mean(-1).tolist(),
        "logps_chosen_std_error": _std_errors(policy[:, 0], estimator.block),
        "logps_rejected_std_error": _std_errors(policy[:, 1], estimator.block),
        "response_tokens": [list(item.response_tokens) for item in items],
        **{name: [None] * len(items) for name in OF_BOTH},
    }
    if TUNED in values:
        columns |= dict(zip(OF_BOTH, _beside_base(items, values, beta, estimator.block), strict=True))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def score_completions(
    both: BothModels,
    rows: Sequence[EncodedCompletion],
    diffusion_samples: int,
    seed: int,
    beta: float,
    token_budget: int | TokenBudget,
) -> list[dict[str, Any]]:
    """As score_pairs, one record per unpaired row. Its reward is beta * (logps - reference_logps)."""
    estimator = evaluation_estimator(diffusion_samples, seed, both.loaded.block_length)
    items = [pair_item(row, estimator, estimator.draw_indices(0)) for row in rows]
    values = _values(both, items, token_budget)
    policy, reference = values[both.names[-1]][:, 0], values[BASE][:, 0] if TUNED in values else None
    columns = {
        "id": [row.id for row in rows],
        "label": [row.label for row in rows],
        "logps": policy.mean(-1).tolist(),
        "logps_std_error": _std_errors(policy, estimator.block),
        "response_tokens": [item.response_tokens[0] for item in items],
        **dict.fromkeys(("reference_logps", "reward", "reward_std_error"), [None] * len(items)),
    }
    if reference is not None:
        reward = beta * (policy - reference)
        columns["reference_logps"], columns["reward"] = reference.mean(-1).tolist(), reward.mean(-1).tolist()
        columns["reward_std_error"] = _std_errors(reward, estimator.block)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(both: BothModels, items: Sequence[Item], token_budget: int | TokenBudget) -> dict[str, Tensor]:
    """By the name of the model, its value of every draw. # float64 [items, sides, draws]"""
    values = {}
    for name in both.names:
        with both.weights_of(name):
            parts = [part.cpu() for _, part in score_windows(both.loaded.denoiser, items, token_budget)]
            values[name] = torch.cat(parts)
    return values


def _beside_base(items: Sequence[Item], values: Mapping[str, Tensor], beta: float, block: int) -> Iterator[list]:
    """The columns of OF_BOTH."""
    reference = values[BASE]
    yield reference[:, 0].mean(-1).tolist()
    yield reference[:, 1].mean(-1).tolist()
    compared = [Item(item.id, item.sides, own.numpy()) for item, own in zip(items, reference, strict=True)]
    scores = PreferenceScores(compared, values[TUNED], DpoObjective("sigmoid", LossOptions(beta)), block)
    yield scores.margins.tolist()
    errors = scores.margin_draw_error
    yield [None] * len(items) if errors is None else errors.tolist()


def _std_errors(draws: Tensor, block: int) -> list[float | None]:
    """Of the mean over the draws of each pair; None for draws that are one block."""
    return [None if math.isnan(error) else error for error in mean_variance(draws, block).sqrt().tolist()]


# what a record says of the base model beside the tuned one, and of their difference
OF_BOTH = ("reference_logps_chosen", "reference_logps_rejected", "margin", "margin_std_error")
