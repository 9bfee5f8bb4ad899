"""What a step minimises: DPO on pairs, or the negative ELBO on single responses (SFT).

Both are `Objective`s of core/gradient.py: float64 functions of per-draw values, without model, config or logging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from laddpo.core.gradient import Item
from laddpo.core.losses import LOSSES, LossOptions, PairScores, gradient_buffers, preference_loss

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class DpoObjective:
    """s = beta * [(B_theta(y_w) - B_ref(y_w)) - (B_theta(y_l) - B_ref(y_l))], loss f(s) (VRPO 2505.19223 eq. 7-8).

    B is the mean over draws; with common random numbers policy and reference used the same masks.
    """

    loss: str
    options: LossOptions

    @property
    def beta(self) -> float:
        """What turns a margin into a reward."""
        return self.options.beta

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference."""
        return LOSSES[self.loss].needs_reference

    def losses(self, items: Sequence[Item], draws: Tensor) -> Tensor:
        """Loss per pair. # float64 [items]"""
        assert not self.needs_reference or all(item.reference is not None for item in items), "a pair without reference"
        assert LOSSES[self.loss].takes_margin or not any(item.margin for item in items), "a margin that nothing reads"
        return preference_loss(self.loss, pair_scores(items, draws), self.options)

    @property
    def of_ratios(self) -> DpoObjective:
        """The part that sees the policy through its ratio to the reference alone."""
        return replace(self, options=replace(self.options, sft_weight=0.0))

    def coefficient_groups(self, sides: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """The draws of a side share dL/dB. For losses of the margin those of the two sides are opposite: one buffer."""
        side = np.repeat(np.arange(sides)[:, None], draws, axis=1)
        if gradient_buffers(self.loss, self.options.sft_weight) == 1:
            return np.zeros_like(side), 1 - 2 * side
        return side, np.ones_like(side)


@dataclass(frozen=True)
class SftObjective:
    """-B / L: the masked-diffusion negative log-likelihood per response token (LLaDA 2502.09992 eq. 5)."""

    def losses(self, items: Sequence[Item], draws: Tensor) -> Tensor:
        """Loss per row. # float64 [items]"""
        lengths = torch.tensor([item.response_tokens[0] for item in items], dtype=torch.float64, device=draws.device)
        return -draws[:, 0].mean(dim=-1) / lengths

    def coefficient_groups(self, sides: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """One response: all draws share their coefficient."""
        return np.zeros((sides, draws), dtype=int), np.ones((sides, draws), dtype=int)


def reference_draws(items: Sequence[Item], device: torch.device) -> Tensor:
    """The reference's values, stacked; 0 for an item without. # float64 [items, sides, draws]"""
    values = [
        np.zeros((len(item.sides), len(item.sides[0]))) if item.reference is None else item.reference for item in items
    ]
    return torch.from_numpy(np.stack(values)).to(device)


def pair_scores(items: Sequence[Item], draws: Tensor) -> PairScores:
    """ELBOs of policy and reference per pair: means over draws. # fields float64 [items]"""
    policy, reference = draws.mean(dim=-1), reference_draws(items, draws.device).mean(dim=-1)
    known = {"dtype": torch.float64, "device": draws.device}
    tokens = torch.tensor([item.response_tokens for item in items], **known)
    return PairScores(
        policy_chosen=policy[:, CHOSEN],
        policy_rejected=policy[:, REJECTED],
        reference_chosen=reference[:, CHOSEN],
        reference_rejected=reference[:, REJECTED],
        chosen_tokens=tokens[:, CHOSEN],
        rejected_tokens=tokens[:, REJECTED],
        target_margin=torch.tensor([item.margin for item in items], **known),
        weights=torch.tensor([item.weight for item in items], **known),
    )


def loss_std_error(objective: DpoObjective, items: Sequence[Item], draws: Tensor, block: int = 1) -> float | None:
    """Standard error of the items' mean loss that the masks bring, to first order in the draws; None for one block.

    The loss is linearised at the draws' own values. Its preference part sees the ratio to the reference, in which the
    noise of common masks cancels; the SFT anchor sees the policy alone, and so does a loss without a reference.
    """
    if draws.shape[-1] < 2 * block:
        return None
    slopes, ratio_slopes = (_slopes(goal, items, draws) for goal in (objective, objective.of_ratios))
    ratio = draws - reference_draws(items, draws.device) if objective.needs_reference else draws
    terms = (ratio_slopes * ratio + (slopes - ratio_slopes) * draws).sum(dim=1) * draws.shape[-1]  # [items, draws]
    return float(mean_variance(terms, block).sum().sqrt() / len(items))


def _slopes(objective: DpoObjective, items: Sequence[Item], draws: Tensor) -> Tensor:
    """dL/d(every draw). # float64 [items, sides, draws]"""
    leaf = draws.detach().requires_grad_()
    return torch.autograd.grad(objective.losses(items, leaf).sum(), leaf)[0]


def score_variance(items: Sequence[Item], draws: Tensor, beta: float, block: int = 1) -> Tensor:
    """V: the variance of the score s = beta * margin, estimated from each pair's own draws. # float64 [items]

    Noise of variance V in the score flattens the preference like label smoothing and biases the sigmoid loss by at most
    V/8 (half the greatest second derivative of -log sigma, 1/4). Draws that a schedule spreads evenly are
    not independent, which this ignores: for them it overstates V.
    """
    ratio = draws - reference_draws(items, draws.device)
    return mean_variance(beta * (ratio[:, CHOSEN] - ratio[:, REJECTED]), block)


def mean_variance(draws: Tensor, block: int = 1) -> Tensor:
    """Variance of the mean over the last axis, from the spread of blocks of `block` neighbouring draws.

    A mask and its inverse belong to one block: they are anything but independent. NaN for a single block; an unpaired
    last draw is left out.
    """
    blocks = draws.shape[-1] // block
    if blocks < 2:
        return torch.full(draws.shape[:-1], torch.nan, dtype=draws.dtype, device=draws.device)
    means = draws[..., : blocks * block].unflatten(-1, (blocks, block)).mean(dim=-1)
    return means.var(dim=-1) / blocks
