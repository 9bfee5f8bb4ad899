"""What can be done about the noise of a score beyond better masks: corrections of the loss, and uses of stored draws.

Rows of CORRECTIONS change the loss of a step (`dpo.correction`); they see it as a function of which draws it may use.
The other functions work on per-draw values that exist already. All are float64, without model or configuration. What
each one gained or lost when measured stands in data/measurements/variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# (draws [items, sides, draws], which of the draws) -> the loss of every item from the means over those draws [items]
PartialLoss = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Correction:
    """A row of CORRECTIONS. `losses(loss, draws, block)`: the corrected loss per item; `groups(draws, block)`: labels
    from 0 of the draws of a side that share their derivative, each further label being one more gradient buffer."""

    losses: Callable[[PartialLoss, Tensor, int], Tensor]
    groups: Callable[[int, int], np.ndarray]


def block_labels(draws: int, block: int) -> np.ndarray:
    """Which block each draw belongs to; an unpaired last draw joins the last block. # int [draws]"""
    return np.minimum(np.arange(draws) // block, max(0, draws // block - 1))


def half_labels(draws: int, block: int) -> np.ndarray:
    """0 for the first half of the blocks, 1 for the second. # int [draws]"""
    labels = block_labels(draws, block)
    return (labels >= (labels[-1] + 1) // 2).astype(int) if labels[-1] else labels


def plain_losses(loss: PartialLoss, draws: Tensor, block: int) -> Tensor:
    """The loss at the mean over all draws, as published."""
    return loss(draws, range(draws.shape[-1]))


def second_order_losses(loss: PartialLoss, draws: Tensor, block: int) -> Tensor:
    """Without the bias that noise brings through the loss's curvature: J f(all) - (J-1)/J sum_j f(all but block j).

    Quenouille's jackknife (1956). To second order E f(s + noise) = f(s) + f''(s) V / 2, and what is subtracted is that
    term with V from the spread of the J blocks, for any loss and without its derivatives. Differentiated as a whole, it
    also takes out the covariance between the coefficient and the gradient of the same draws.
    """
    labels = block_labels(draws.shape[-1], block)
    blocks = labels[-1] + 1
    assert blocks > 1, f"{draws.shape[-1]} draws in blocks of {block}: a correction needs two blocks"
    without = [loss(draws, np.flatnonzero(labels != j)) for j in range(blocks)]
    return blocks * plain_losses(loss, draws, block) - (blocks - 1) / blocks * sum(without)


def cross_fitted_losses(loss: PartialLoss, draws: Tensor, block: int) -> Tensor:
    """The published value, with the gradient of one half of the draws weighed by the other half's coefficient.

    The coefficient f'(s_hat) and the gradient of s_hat come from the same masks and are correlated, which biases their
    product; halves that are independent are not (cross-fitting, Chernozhukov et al. 2018, here within a pair). Halves
    of draws that are spread out are not independent, and a little of the bias stays.
    """
    labels = half_labels(draws.shape[-1], block)
    assert labels[-1] == 1, f"{draws.shape[-1]} draws in blocks of {block}: cross-fitting needs two blocks"
    value = plain_losses(loss, draws, block).detach()
    halves = [np.flatnonzero(labels == half) for half in (0, 1)]
    for fitted, applied in (halves, halves[::-1]):
        leaf = draws.detach().requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(loss(leaf, fitted).sum(), leaf)
        means = draws[..., applied].mean(dim=-1)  # [items, sides]
        value = value + 0.5 * (slopes.sum(dim=-1) * (means - means.detach())).sum(dim=-1)
    return value


CORRECTIONS: dict[str, Correction] = {
    "none": Correction(plain_losses, lambda draws, block: np.zeros(draws, dtype=int)),
    "second_order": Correction(second_order_losses, block_labels),
    "cross_fit": Correction(cross_fitted_losses, half_labels),
}
