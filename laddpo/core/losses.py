"""Preference losses: pure functions of the policy's and the reference's ELBOs, one row each in LOSSES.

Every function takes float64 tensors of one shape, elementwise over pairs: B_w, B_l (policy ELBO of the chosen and the
rejected response, in nats, summed over tokens), the reference's R_w, R_l, the response lengths L_w, L_l in tokens, and
beta. It returns the loss per pair. Values equal TRL's for the same numbers (TRL's formulas, with its log-probabilities
replaced by ELBOs), except label smoothing in sigmoid and sigmoid_norm.

A new loss is one function and one row. Settings, checks and the memory plan read the row, so nothing here imports torch
when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """What a preference loss may look at. # every field [pairs], float64"""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi_theta(y_w|x) - log pi_ref(y_w|x), both replaced by their bounds."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """The same for y_l."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """The score s of VRPO eq. 7 without beta."""
        return self.chosen_ratio - self.rejected_ratio


def sigmoid(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta * margin): DPO (2305.18290 eq. 7), VRPO (2505.19223 eq. 7-8).

    With label_smoothing e > 0, conservative DPO: (1-e) * loss(margin) + e * loss(-margin).
    """
    logits = beta * scores.margin
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (2403.00409 eq. 6): unbiased under labels flipped with probability label_smoothing < 1/2."""
    logits = beta * scores.margin
    clean = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return clean / (1 - 2 * label_smoothing)


def hinge(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """max(0, 1 - beta * margin): SLiC-HF (2305.10425) on the DPO margin."""
    return (1 - beta * scores.margin).relu()


def ipo(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """(margin per token - 1 / (2 beta))^2: IPO (2310.12036 eq. 17), on per-token ratios as in TRL."""
    margin = scores.chosen_ratio / scores.chosen_tokens - scores.rejected_ratio / scores.rejected_tokens
    return (margin - 1 / (2 * beta)) ** 2


def apo_zero(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """Raise chosen, lower rejected: APO-zero (2408.06266 eq. 7)."""
    return (1 - (beta * scores.chosen_ratio).sigmoid()) + (beta * scores.rejected_ratio).sigmoid()


def apo_down(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """Lower chosen, rejected more: APO-down (2408.06266 eq. 8), for pairs whose chosen is worse than the policy."""
    return (beta * scores.chosen_ratio).sigmoid() + (1 - (beta * scores.margin).sigmoid())


def sigmoid_norm(scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta * margin of per-token ratios): length-normalised DPO (Tulu 3, 2411.15124).

    A per-token score is about L times smaller than a sequence score: beta must be larger by the response length.
    """
    margin = scores.chosen_ratio / scores.chosen_tokens - scores.rejected_ratio / scores.rejected_tokens
    logits = beta * margin
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def preference_loss(name: str, scores: PairScores, beta: float, label_smoothing: float, sft_weight: float) -> Tensor:
    """The loss per pair, with the SFT anchor -B_w / L_w on the chosen response times `sft_weight` (VRPO uses 0.05).

    # float64 [pairs]
    """
    loss = LOSSES[name].function(scores, beta, label_smoothing)
    if sft_weight:
        loss = loss - sft_weight * scores.policy_chosen / scores.chosen_tokens
    return loss


def gradient_buffers(name: str, sft_weight: float) -> int:
    """Gradient buffers that a pair larger than a micro-step needs: one serves both sides of a loss of the margin."""
    return 1 if LOSSES[name].depends_on_margin and not sft_weight else 2


def logsigmoid(values: Tensor) -> Tensor:
    """log sigma, without overflow."""
    from torch.nn import functional

    return functional.logsigmoid(values)


@dataclass(frozen=True)
class PreferenceLoss:
    """A row of LOSSES.

    `depends_on_margin`: the loss sees B_w and B_l only through B_w - B_l, so its derivatives by them are opposite and
    one gradient buffer serves both. `takes_label_smoothing`: dpo.label_smoothing means something to it.
    `smoothing_below`: a bound that dpo.label_smoothing must not reach. `is_per_token`: it scores per token, where beta
    is usually larger by the response length.
    """

    function: Callable[[PairScores, float, float], Tensor]
    depends_on_margin: bool
    takes_label_smoothing: bool = False
    smoothing_below: float | None = None
    is_per_token: bool = False


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, depends_on_margin=True, takes_label_smoothing=True),
    "robust": PreferenceLoss(robust, depends_on_margin=True, takes_label_smoothing=True, smoothing_below=0.5),
    "hinge": PreferenceLoss(hinge, depends_on_margin=True),
    "ipo": PreferenceLoss(ipo, depends_on_margin=False, is_per_token=True),
    "apo_zero": PreferenceLoss(apo_zero, depends_on_margin=False),
    "apo_down": PreferenceLoss(apo_down, depends_on_margin=False),
    "sigmoid_norm": PreferenceLoss(
        sigmoid_norm, depends_on_margin=False, takes_label_smoothing=True, is_per_token=True
    ),
}
