"""Corrections of the loss for the noise of its score, as `variance` studies them. Training has none: they did not help.

A correction sees the loss as a function of which draws it may use. What each one gained or lost when it was measured
is in data/measurements/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from laddpo.core.gradient import Item
from laddpo.core.objectives import DpoObjective

# (draws [items, sides, draws], which of the draws) -> the loss of every item from the means over those draws [items]
PartialLoss = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class CorrectedObjective:
    """An objective whose loss a row of CORRECTIONS corrects, for draws of which `block` neighbours belong together."""

    objective: DpoObjective
    correction: str
    block: int

    def losses(self, items: Sequence[Item], draws: Tensor) -> Tensor:
        """Loss per pair. # float64 [items]"""

        def loss(values: Tensor, which: Sequence[int]) -> Tensor:
            which = np.asarray(which)
            partial = [replace(item, reference=item.reference[:, which]) for item in items]
            return self.objective.losses(partial, values[..., which])

        return CORRECTIONS[self.correction](loss, draws, self.block)

    def coefficient_groups(self, sides: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Every draw has a derivative of its own."""
        return np.arange(sides * draws).reshape(sides, draws), np.ones((sides, draws), dtype=int)


def block_labels(draws: int, block: int) -> np.ndarray:
    """Which block each draw belongs to; an unpaired last draw joins the last block. # int [draws]"""
    return np.minimum(np.arange(draws) // block, max(0, draws // block - 1))


def half_labels(draws: int, block: int) -> np.ndarray:
    """0 for the first half of the blocks, 1 for the second. # int [draws]"""
    labels = block_labels(draws, block)
    return (labels >= (labels[-1] + 1) // 2).astype(int) if labels[-1] else labels


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
    return blocks * loss(draws, range(draws.shape[-1])) - (blocks - 1) / blocks * sum(without)


def cross_fitted_losses(loss: PartialLoss, draws: Tensor, block: int) -> Tensor:
    """The published value, with the gradient of one half of the draws weighed by the other half's coefficient.

    The coefficient f'(s_hat) and the gradient of s_hat come from the same masks and are correlated, which biases their
    product; halves that are independent are not (cross-fitting, Chernozhukov et al. 2018, here within a pair). Halves
    of draws that are spread out are not independent, and a little of the bias stays.
    """
    labels = half_labels(draws.shape[-1], block)
    assert labels[-1] == 1, f"{draws.shape[-1]} draws in blocks of {block}: cross-fitting needs two blocks"
    value = loss(draws, range(draws.shape[-1])).detach()
    halves = [np.flatnonzero(labels == half) for half in (0, 1)]

    for fitted, applied in (halves, halves[::-1]):
        leaf = draws.detach().requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(loss(leaf, fitted).sum(), leaf)
        means = draws[..., applied].mean(dim=-1)  # [items, sides]
        value = value + 0.5 * (slopes.sum(dim=-1) * (means - means.detach())).sum(dim=-1)
    return value


CORRECTIONS: dict[str, Callable[[PartialLoss, Tensor, int], Tensor]] = {
    "second_order": second_order_losses,
    "cross_fit": cross_fitted_losses,
}
