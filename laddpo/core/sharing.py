"""Scores and gradients of items that the processes of a run divide among themselves.

All ranks call with the same items; each computes its share, balanced by tokens, and all get all values. Alone, these
are `score_items` and `accumulate_gradient` to the bit. With several ranks sums are taken in another order and sequences
are packed with others, which moves values by rounding and nothing else: noise belongs to the pair, not to the process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item, Objective, StepValues, accumulate_gradient, lockstep, score_items, take_part
from laddpo.processes.ranks import ALONE, Ranks, share_out


def score_shared(
    denoiser: Denoiser, items: Sequence[Item], token_budget: int | TokenBudget, ranks: Ranks = ALONE
) -> Tensor:
    """Per-draw values of all items, without a graph. # float64 [items, sides, draws]"""
    if ranks.world == 1:
        return score_items(denoiser, items, token_budget)
    shares = shares_of(items, ranks)
    own = [items[i] for i in shares[ranks.rank]]
    with lockstep(denoiser):
        values = score_items(denoiser, own, token_budget) if own else torch.empty(0, dtype=torch.float64)
    return _gathered(values, _value_shape(items), shares, denoiser.device, ranks)


def accumulate_shared(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    items: Sequence[Item],
    objective: Objective,
    scale: float,
    token_budget: int | TokenBudget,
    mode: str,
    ranks: Ranks = ALONE,
) -> StepValues:
    """Leave the gradient of `scale * sum of the losses of ALL items` in every rank's `parameter.grad`.

    A rank without items contributes zeros. `scale` is that of one process: 1 / (items of the global step).
    """
    if ranks.world == 1:
        return accumulate_gradient(denoiser, parameters, items, objective, scale, token_budget, mode)
    shares = shares_of(items, ranks)
    own = [items[i] for i in shares[ranks.rank]]
    if own:
        values = accumulate_gradient(denoiser, parameters, own, objective, scale, token_budget, mode)
    else:
        take_part(denoiser, mode)
        values = StepValues(torch.empty(0), torch.empty(0))
    draws = _gathered(values.draws, _value_shape(items), shares, denoiser.device, ranks)
    losses = _gathered(values.losses, (), shares, denoiser.device, ranks)
    ranks.sum_gradients(parameters)
    return StepValues(draws, losses)


def shares_of(items: Sequence[Item], ranks: Ranks) -> list[list[int]]:
    """Places of the items of every rank."""
    return share_out([item.full_tokens for item in items], ranks.world)


def _value_shape(items: Sequence[Item]) -> tuple[int, int]:
    """(sides, draws) of an item."""
    return len(items[0].sides), len(items[0].sides[0])


def _gathered(
    values: Tensor, shape: tuple[int, ...], shares: Sequence[Sequence[int]], device: torch.device, ranks: Ranks
) -> Tensor:
    """Every rank's values, `shape` for each item, put back into the order of the items. # float64 [items, *shape]"""
    together = torch.empty(sum(map(len, shares)), *shape, dtype=torch.float64)
    for share, part in zip(shares, ranks.gather_arrays(values.cpu().numpy()), strict=True):
        together[share] = torch.tensor(part).view(len(share), *shape)
    return together.to(device)
