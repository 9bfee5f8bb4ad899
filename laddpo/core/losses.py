"""Preference losses: pure functions of the policy's and the reference's ELBOs, one row each in LOSSES.

A loss of pairs takes PairScores and LossOptions. It returns the loss per pair. A loss of single completions with labels
takes CompletionScores, LossOptions and a baseline in nats. It returns the loss per completion. All tensors are float64,
and all functions work elementwise. Values equal TRL's for the same numbers (TRL's formulas, with its log-probabilities
replaced by ELBOs), except label smoothing in sigmoid and sigmoid_norm. TRL has no dpop and no margin in these losses.

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
class LossOptions:
    """The numbers that losses read. `PreferenceLoss.reads` names those beside beta and sft_weight."""

    beta: float
    sft_weight: float = 0.0
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    dpop_lambda: float = 50.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class PairScores:
    """What a loss of pairs may look at. # every tensor [pairs], float64

    ELBOs are in nats, summed over tokens. `target_margin` is what the score should exceed (dpo: beta * margin), given
    by the data. `weights` multiply the loss of each pair.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    target_margin: Tensor | float = 0.0
    weights: Tensor | float = 1.0

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


@dataclass(frozen=True)
class CompletionScores:
    """What a loss of single completions may look at. # every tensor [completions]; `labels` bool, the others float64"""

    policy: Tensor
    reference: Tensor
    labels: Tensor
    tokens: Tensor
    weights: Tensor | float = 1.0

    @property
    def ratio(self) -> Tensor:
        """log pi_theta(y|x) - log pi_ref(y|x), both replaced by their bounds."""
        return self.policy - self.reference


def sigmoid(scores: PairScores, options: LossOptions) -> Tensor:
    """-log sigma(beta * margin - m): DPO (2305.18290 eq. 7), VRPO (2505.19223 eq. 7-8).

    With label_smoothing e > 0, conservative DPO: (1-e) * loss(margin) + e * loss(-margin). m is the pair's target
    margin, 0 for most data; it enters as in the loss of reward models (2307.09288 eq. 2).
    """
    return smoothed(options.beta * scores.margin - scores.target_margin, options.label_smoothing)


def robust(scores: PairScores, options: LossOptions) -> Tensor:
    """Robust DPO (2403.00409 eq. 6): unbiased under labels flipped with probability label_smoothing < 1/2."""
    logits, smoothing = options.beta * scores.margin - scores.target_margin, options.label_smoothing
    clean = -(1 - smoothing) * logsigmoid(logits) + smoothing * logsigmoid(-logits)
    return clean / (1 - 2 * smoothing)


def hinge(scores: PairScores, options: LossOptions) -> Tensor:
    """max(0, 1 - beta * margin): SLiC-HF (2305.10425) on the DPO margin."""
    return (1 - options.beta * scores.margin).relu()


def ipo(scores: PairScores, options: LossOptions) -> Tensor:
    """(margin per token - 1 / (2 beta))^2: IPO (2310.12036 eq. 17), on per-token ratios as in TRL."""
    margin = scores.chosen_ratio / scores.chosen_tokens - scores.rejected_ratio / scores.rejected_tokens
    return (margin - 1 / (2 * options.beta)) ** 2


def apo_zero(scores: PairScores, options: LossOptions) -> Tensor:
    """Raise chosen, lower rejected: APO-zero (2408.06266 eq. 7)."""
    return (1 - (options.beta * scores.chosen_ratio).sigmoid()) + (options.beta * scores.rejected_ratio).sigmoid()


def apo_down(scores: PairScores, options: LossOptions) -> Tensor:
    """Lower chosen, rejected more: APO-down (2408.06266 eq. 8), for pairs whose chosen is worse than the policy."""
    return (options.beta * scores.chosen_ratio).sigmoid() + (1 - (options.beta * scores.margin).sigmoid())


def sigmoid_norm(scores: PairScores, options: LossOptions) -> Tensor:
    """-log sigma(beta * margin of per-token ratios - m): length-normalised DPO (Tulu 3, 2411.15124).

    A per-token score is about L times smaller than a sequence score: beta must be larger by the response length.
    """
    margin = scores.chosen_ratio / scores.chosen_tokens - scores.rejected_ratio / scores.rejected_tokens
    return smoothed(options.beta * margin - scores.target_margin, options.label_smoothing)


def dpop(scores: PairScores, options: LossOptions) -> Tensor:
    """DPO-Positive (2402.13228 eq. 3): DPO, with a penalty where the chosen response falls below the reference.

    -log sigma(beta * (margin - lambda * max(0, -chosen ratio)) - m).
    """
    penalty = options.dpop_lambda * (-scores.chosen_ratio).relu()
    return -logsigmoid(options.beta * (scores.margin - penalty) - scores.target_margin)


def exo_pair(scores: PairScores, options: LossOptions) -> Tensor:
    """KL from the policy's preference to (1-e, e): EXO (2402.00856 eq. 16). e is label_smoothing, above 0: log e."""
    import math

    logits, smoothing = options.beta * scores.margin, options.label_smoothing
    wins = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-smoothing))
    return wins + (-logits).sigmoid() * (logsigmoid(-logits) - math.log(smoothing))


def nca_pair(scores: PairScores, options: LossOptions) -> Tensor:
    """NCA (2402.05369) of two responses: each reward is a log-odds against the reference; chosen up, both held near."""
    chosen, rejected = options.beta * scores.chosen_ratio, options.beta * scores.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(scores: PairScores, options: LossOptions) -> Tensor:
    """BCO (2404.04656) on pairs: a classifier of chosen against rejected. Without the paper's running mean, as TRL."""
    return -logsigmoid(options.beta * scores.chosen_ratio) - logsigmoid(-options.beta * scores.rejected_ratio)


def sppo_hard(scores: PairScores, options: LossOptions) -> Tensor:
    """SPPO (2405.00675 eq. 4.7) with win probabilities 1 and 0: ratios go to 1 / (2 beta) and -1 / (2 beta)."""
    target = 0.5 / options.beta
    return (scores.chosen_ratio - target) ** 2 + (scores.rejected_ratio + target) ** 2


def simpo(scores: PairScores, options: LossOptions) -> Tensor:
    """SimPO (2405.14734 eq. 6), without a reference: -log sigma(beta * (B_w / L_w - B_l / L_l) - gamma - m)."""
    margin = scores.policy_chosen / scores.chosen_tokens - scores.policy_rejected / scores.rejected_tokens
    logits = options.beta * margin - options.simpo_gamma - scores.target_margin
    return smoothed(logits, options.label_smoothing)


def cpo(scores: PairScores, options: LossOptions) -> Tensor:
    """CPO (2401.08417 eq. 3), without a reference: -log sigma(beta * (B_w - B_l) - m), and alpha times -B_w / L_w.

    The second term is per token as in TRL; the paper sums over tokens.
    """
    logits = options.beta * (scores.policy_chosen - scores.policy_rejected) - scores.target_margin
    likelihood = scores.policy_chosen / scores.chosen_tokens
    return smoothed(logits, options.label_smoothing) - options.cpo_alpha * likelihood


def orpo(scores: PairScores, options: LossOptions) -> Tensor:
    """ORPO (2403.07691 eq. 4, 6-7), without a reference: -B_w / L_w - beta * log sigma(log odds_w - log odds_l).

    odds = p / (1 - p) of p = exp(B / L), the probability per token. Here beta is the weight of a term, not a scale.
    """
    chosen, rejected = scores.policy_chosen / scores.chosen_tokens, scores.policy_rejected / scores.rejected_tokens
    return -chosen - options.beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


def kto(scores: CompletionScores, options: LossOptions, baseline: Tensor | float) -> Tensor:
    """KTO (2402.01306 eq. 7): desirable above the baseline, undesirable below. The baseline z estimates a KL, in nats.

    1 - sigma(beta * (ratio - z)) for desirable completions, 1 - sigma(beta * (z - ratio)) for undesirable ones.
    """
    above = options.beta * (scores.ratio - baseline)
    return 1 - above.where(scores.labels, -above).sigmoid()


def apo_zero_unpaired(scores: CompletionScores, options: LossOptions, baseline: Tensor | float) -> Tensor:
    """APO-zero (2408.06266 eq. 7) on single completions: KTO with a baseline of 0."""
    return kto(scores, options, 0.0)


def preference_loss(name: str, scores: PairScores, options: LossOptions) -> Tensor:
    """The loss per pair, times the pair's weight. # float64 [pairs]

    The SFT anchor -B_w / L_w on the chosen response is added `sft_weight` times (VRPO uses 0.05).

    The loss of a step is sum(weight * loss) / pairs. It is not divided by the sum of weights: a pair's share in the
    gradient must not depend on the pairs that share its step.
    """
    loss = LOSSES[name].function(scores, options)
    if options.sft_weight:
        loss = loss - options.sft_weight * scores.policy_chosen / scores.chosen_tokens
    return loss * scores.weights


def completion_loss(name: str, scores: CompletionScores, options: LossOptions, baseline: Tensor | float) -> Tensor:
    """The loss per completion, times its own weight and that of its label. # float64 [completions]

    The SFT anchor -B / L is added `sft_weight` times to desirable completions, outside the weight of the label. As for
    pairs, the loss of a step is divided by the number of completions and not by their weights.
    """
    loss = LOSSES[name].function(scores, options, baseline)
    desirable = scores.labels.to(loss.dtype)
    loss = loss * (options.desirable_weight * desirable + options.undesirable_weight * (1 - desirable))
    if options.sft_weight:
        loss = loss - options.sft_weight * desirable * scores.policy / scores.tokens
    return loss * scores.weights


def gradient_buffers(name: str, sft_weight: float) -> int:
    """Gradient buffers that a pair larger than a micro-step needs: one serves both sides of a loss of the margin.

    A single completion needs one.
    """
    row = LOSSES[name]
    return 1 if not row.takes_pairs or (row.depends_on_margin and not sft_weight) else 2


def logsigmoid(values: Tensor) -> Tensor:
    """log sigma, without overflow."""
    from torch.nn import functional

    return functional.logsigmoid(values)


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-log sigma of the logits, mixed with that of the flipped pair."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


SUREST_LOGP = -(2.0**-23)  # log of the largest probability below 1 that float32 holds apart from 1


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp).

    The odds of p = 1 are infinite. A log-probability above SUREST_LOGP counts as SUREST_LOGP and has no slope.
    """
    held = logp.clamp(max=SUREST_LOGP)
    return held - (-held.expm1()).log()


@dataclass(frozen=True)
class PreferenceLoss:
    """A row of LOSSES.

    `depends_on_margin`: the loss sees B_w and B_l only through B_w - B_l, so its derivatives by them are opposite and
    one gradient buffer serves both. `reads`: the fields of LossOptions that it reads beside beta and sft_weight.
    `smoothing_below`: a bound that dpo.label_smoothing must not reach; `smoothing_above`: one that it must exceed.
    `is_per_token`: it scores per token, where beta is usually larger by the response length. `takes_pairs`: false for
    single completions with a label. `needs_reference`: false if it never looks at the reference. `has_baseline`: it
    looks at the baseline. `takes_margin`: it looks at the target margin of the data. `has_sft_term`: it holds the SFT
    anchor itself, so dpo.sft_weight would add it twice.
    """

    function: Callable[..., Tensor]
    depends_on_margin: bool
    reads: tuple[str, ...] = ()
    smoothing_below: float | None = None
    smoothing_above: float | None = None
    is_per_token: bool = False
    takes_pairs: bool = True
    needs_reference: bool = True
    has_baseline: bool = False
    takes_margin: bool = False
    has_sft_term: bool = False

    @property
    def takes_label_smoothing(self) -> bool:
        """Whether dpo.label_smoothing means something to it."""
        return "label_smoothing" in self.reads


SMOOTHING = ("label_smoothing",)
LABEL_WEIGHTS = ("desirable_weight", "undesirable_weight")
LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, depends_on_margin=True, reads=SMOOTHING, takes_margin=True),
    "robust": PreferenceLoss(robust, depends_on_margin=True, reads=SMOOTHING, smoothing_below=0.5, takes_margin=True),
    "hinge": PreferenceLoss(hinge, depends_on_margin=True),
    "ipo": PreferenceLoss(ipo, depends_on_margin=False, is_per_token=True),
    "apo_zero": PreferenceLoss(apo_zero, depends_on_margin=False),
    "apo_down": PreferenceLoss(apo_down, depends_on_margin=False),
    "sigmoid_norm": PreferenceLoss(
        sigmoid_norm, depends_on_margin=False, reads=SMOOTHING, is_per_token=True, takes_margin=True
    ),
    "dpop": PreferenceLoss(dpop, depends_on_margin=False, reads=("dpop_lambda",), takes_margin=True),
    "exo_pair": PreferenceLoss(exo_pair, depends_on_margin=True, reads=SMOOTHING, smoothing_above=0.0),
    "nca_pair": PreferenceLoss(nca_pair, depends_on_margin=False),
    "bco_pair": PreferenceLoss(bco_pair, depends_on_margin=False),
    "sppo_hard": PreferenceLoss(sppo_hard, depends_on_margin=False),
    "simpo": PreferenceLoss(
        simpo,
        depends_on_margin=False,
        reads=(*SMOOTHING, "simpo_gamma"),
        is_per_token=True,
        needs_reference=False,
        takes_margin=True,
    ),
    "cpo": PreferenceLoss(
        cpo,
        depends_on_margin=False,
        reads=(*SMOOTHING, "cpo_alpha"),
        needs_reference=False,
        takes_margin=True,
        has_sft_term=True,
    ),
    "orpo": PreferenceLoss(orpo, depends_on_margin=False, needs_reference=False, has_sft_term=True),
    "kto": PreferenceLoss(kto, depends_on_margin=False, reads=LABEL_WEIGHTS, takes_pairs=False, has_baseline=True),
    "apo_zero_unpaired": PreferenceLoss(
        apo_zero_unpaired, depends_on_margin=False, reads=LABEL_WEIGHTS, takes_pairs=False
    ),
}
OPTION_READERS = {
    option: tuple(name for name, row in LOSSES.items() if option in row.reads)
    for option in dict.fromkeys(option for row in LOSSES.values() for option in row.reads)
}
