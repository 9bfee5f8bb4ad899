"""What was tried beyond the masks, each measured on one setting's draws: a row of TECHNIQUES with its source.

Takes what noise.py measured (per-draw values of policy and reference) and, where gradients are concerned,
the model; gives plain numbers for the table, None for a ratio to nothing. A technique that does not help here stays out
of the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item, Objective
from laddpo.core.objectives import DpoObjective, score_variance
from laddpo.estimator_study.corrections import CORRECTIONS, CorrectedObjective
from laddpo.estimator_study.noise import GradientSpread, Measured, noise_items, ratio_of
from laddpo.estimator_study.tokens import token_values

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedPair

UPPER_SHARE = 0.5  # of the upper bound in the mixture, as SPG


@dataclass(frozen=True)
class Technique:
    """A row of TECHNIQUES: what it is and where it comes from."""

    source: str
    idea: str


def study(
    measured: Measured,
    reference_mixed: np.ndarray,
    objective: DpoObjective,
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    pairs: Sequence[EncodedPair],
    token_budget: int | TokenBudget,
) -> dict[str, Any]:
    """All techniques on one setting's draws; `pairs` are the first of the measured ones, whose gradients are taken."""
    result = {
        "control_variate": control_variate(measured, objective.beta),
        "adaptive_draws": adaptive_draws(measured, objective.beta),
        "loss": corrected_losses(measured, objective),
        "gradient": {},
        "upper_bound": upper_bound_mixture(measured, reference_mixed, objective, denoiser, parameters, pairs),
    }
    if measured.draws >= 2 * measured.estimator.block:
        for correction in CORRECTIONS:
            goal = CorrectedObjective(objective, correction, measured.estimator.block)
            trace = gradient_of(measured, goal, denoiser, parameters, pairs, token_budget)
            result["gradient"][correction] = ratio_of(trace, measured.gradient[: len(pairs)])
    return result


def control_variate(measured: Measured, beta: float) -> dict[str, Any]:
    """The score with the reference as control variate, c from the other pairs, its mean from the other evaluations.

    Each evaluation in turn plays the step; the E - 1 others play the stored draws of the reference.
    """
    evaluations, _, _, draws = measured.policy.shape
    scores, coefficients, biases = [], [], []
    for e in range(evaluations):
        others = np.delete(measured.reference, e, axis=0).mean(axis=-1)  # [E-1, pairs, 2]
        mean = torch.from_numpy(others.mean(axis=0))
        error = torch.from_numpy(others.std(axis=0, ddof=1) / len(others) ** 0.5)
        policy, reference = torch.from_numpy(measured.policy[e]), torch.from_numpy(measured.reference[e])
        coefficient = control_coefficients(policy, reference) if draws > 1 else torch.ones(len(policy)).double()
        scores.append(beta * controlled_margins(policy, reference, mean, coefficient))
        coefficients.append(float(coefficient.mean()))
        biases.append(float(beta * control_bias(coefficient, error).mean()))
    found = torch.stack(scores).var(dim=0).numpy()
    return {
        "score_variance_ratio": ratio_of(found, measured.scores(beta).var(axis=0, ddof=1)),
        "coefficient": float(np.mean(coefficients)),
        "bias_bound": float(np.mean(biases)),
        "stored_draws": (evaluations - 1) * draws,
    }


def adaptive_draws(measured: Measured, beta: float) -> dict[str, Any]:
    """Variance at equal total when draws follow each pair's spread, found on other evaluations than it is judged on.

    `known`: the spread comes from the even evaluations together; `own`: from the own draws of one of them, as in
    training. Judged on the odd ones as sum v_i n / n_i, as if the variance fell like 1/n.
    """
    scores = measured.scores(beta)
    even, odd = scores[::2], scores[1::2]
    block, draws, pairs = measured.estimator.block, measured.draws, scores.shape[1]
    result: dict[str, Any] = {"known": None, "own": None}
    if draws < 2 * block or len(even) < 2 or len(odd) < 2:
        return result
    judged = odd.var(axis=0, ddof=1)
    item = [Item("", (), reference) for reference in measured.reference[0]]
    own = score_variance(item, torch.from_numpy(measured.policy[0]), beta, block).numpy()
    for name, variance in (("known", even.var(axis=0, ddof=1)), ("own", own)):
        counts = allocate_draws(np.sqrt(variance), draws * pairs, block)
        result[name] = ratio_of(judged * draws / counts, judged)
    return result


def corrected_losses(measured: Measured, objective: DpoObjective) -> dict[str, dict[str, float]]:
    """Bias and variance of the loss as it is and with the correction that changes its value.

    The truth is the loss at the mean over all evaluations.
    """
    pooled = _items(measured, _pooled(measured.reference))
    truth = objective.losses(pooled, torch.from_numpy(_pooled(measured.policy))).numpy()
    if measured.draws < 2 * measured.estimator.block:
        return {}
    corrected = CorrectedObjective(objective, "second_order", measured.estimator.block)
    result = {}
    for name, goal in (("none", objective), ("second_order", corrected)):
        losses = np.stack(
            [
                goal.losses(_items(measured, reference), torch.from_numpy(policy)).numpy()
                for policy, reference in zip(measured.policy, measured.reference, strict=True)
            ]
        )
        bias, variance = losses.mean(axis=0) - truth, losses.var(axis=0, ddof=1)
        result[name] = {
            "bias": float(bias.mean()),
            "std_error": float(bias.std(ddof=1) / len(bias) ** 0.5),
            "variance": float(variance.mean()),
        }
    return result


def gradient_of(
    measured: Measured,
    objective: Objective,
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    pairs: Sequence[EncodedPair],
    token_budget: int | TokenBudget,
) -> np.ndarray:
    """Gradient variance of each pair under another objective, on the same masks. # [pairs]"""
    spread = GradientSpread(len(pairs))
    for e, reference in enumerate(measured.reference):
        items = noise_items(pairs, measured.estimator_of(e), reference[: len(pairs)])
        for i, item in enumerate(items):
            spread.add(i, denoiser, parameters, item, objective, token_budget)
    return spread.traces()[0]


def mixed_margin(values: Sequence[tuple[Tensor, Tensor, Tensor]], share: float) -> tuple[Tensor, float]:
    """B(y_w) - [share * upper bound + (1 - share) * B](y_l) of one model, and how far the bound lies above B."""
    elbos = [(logps * hidden * weights).sum(dim=1).mean() for logps, hidden, weights in values]
    upper = upper_bound(*values[1])
    return elbos[0] - mixture(elbos[1], upper, share), float((upper - elbos[1]).detach())


def reference_mixture(
    denoiser: Denoiser, estimator_of: Callable[[int], ElboEstimator], evaluations: int, pairs: Sequence[EncodedPair]
) -> np.ndarray:
    """The reference's mixed margins. # [evaluations, pairs]"""
    with torch.no_grad():
        rows = [noise_items(pairs, estimator_of(e), None) for e in range(evaluations)]
        margins = [[mixed_margin(token_values(denoiser, item), UPPER_SHARE)[0] for item in row] for row in rows]
    return np.array([[float(margin) for margin in row] for row in margins])


def upper_bound_mixture(
    measured: Measured,
    reference: np.ndarray,
    objective: DpoObjective,
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    pairs: Sequence[EncodedPair],
) -> dict[str, float]:
    """Score and gradient variance with SPG's mixture for the rejected side, over the ELBO's, at the sigmoid loss."""
    spread = GradientSpread(len(pairs))
    scores, gaps = np.zeros(reference.shape), []
    for e in range(len(reference)):
        for i, item in enumerate(noise_items(pairs, measured.estimator_of(e), None)):
            margin, gap = mixed_margin(token_values(denoiser, item), UPPER_SHARE)
            score = objective.beta * (margin - reference[e, i])
            (-torch.nn.functional.logsigmoid(score)).backward()
            spread.add_gradient(i, parameters)
            scores[e, i] = float(score.detach())
            gaps.append(gap)
    plain = measured.scores(objective.beta)[:, : len(pairs)]
    trace = spread.traces()[0]
    return {
        "score_variance_ratio": ratio_of(scores.var(axis=0, ddof=1), plain.var(axis=0, ddof=1)),
        "gradient_variance_ratio": ratio_of(trace, measured.gradient[: len(pairs)]),
        "bound_above_elbo": float(np.mean(gaps)),
        "score_change": float((scores.mean(axis=0) - plain.mean(axis=0)).mean()),
    }


@dataclass(frozen=True)
class _Sized:
    """Stands for a sequence of which only the response's length is asked."""

    tokens: int

    @property
    def response_ids(self) -> range:
        return range(self.tokens)


def _items(measured: Measured, references: np.ndarray) -> list[Item]:
    """Items of which only lengths and reference values are asked. # references [pairs, 2, draws]"""
    sides = [tuple((_Sized(int(tokens)),) for tokens in lengths) for lengths in measured.tokens]
    return [Item("", side, reference) for side, reference in zip(sides, references, strict=True)]


def _pooled(values: np.ndarray) -> np.ndarray:
    """All evaluations' draws of each pair side by side. # [pairs, 2, evaluations * draws]"""
    return np.ascontiguousarray(values.transpose(1, 2, 0, 3).reshape(*values.shape[1:3], -1))


TECHNIQUES: dict[str, Technique] = {
    "masks in fours (balanced)": Technique("ours", "every token hidden twice, no two masks inverses"),
    "focus on differing tokens": Technique("ours", "importance sampling of the picked token, exactly reweighted"),
    "low-discrepancy counts": Technique("Cranley and Patterson 1976", "shifted van der Corput sequence"),
    "complementary masks": Technique("ESPO 2512.03759", "a mask and its inverse, every token scored once"),
    "shared counts, shared masks": Technique("ours", "chosen and rejected mask alike, to cancel in the margin"),
    "control variate": Technique("textbook; for DPO ours", "reference draws with a coefficient from other pairs"),
    "own variance estimate": Technique("textbook", "V from the spread of a pair's own draws"),
    "second-order correction": Technique("Quenouille 1956", "jackknife over blocks of draws"),
    "cross-fitting": Technique("Chernozhukov et al. 2018", "coefficient and gradient from different halves"),
    "adaptive draws": Technique("Neyman 1934", "draws in proportion to each pair's standard deviation"),
    "upper-bound mixture": Technique("SPG 2510.09541", "an upper bound for what is made less likely"),
}


def control_coefficients(policy: Tensor, reference: Tensor) -> Tensor:
    """For each pair the coefficient c of the reference as a control variate, fitted on the OTHER pairs. # [pairs]

    Takes per-draw values float64 [pairs, sides, draws] of common masks. c = Cov / Var within pairs minimises the
    variance of B_theta - c (B_ref - mean B_ref); common random numbers alone are c = 1. A coefficient that has not seen
    a pair's own draws leaves its estimate unbiased.
    """
    a, b = (values - values.mean(dim=-1, keepdim=True) for values in (policy, reference))
    covariance, variance = (a * b).sum(dim=(1, 2)), (b * b).sum(dim=(1, 2))
    return (covariance.sum() - covariance) / (variance.sum() - variance)


def controlled_margins(policy: Tensor, reference: Tensor, reference_mean: Tensor, coefficient: Tensor) -> Tensor:
    """Margins with the reference as control variate, its mean known from many stored draws. # [pairs]

    reference_mean [pairs, sides]. An error e of it moves a margin by (1 - c) e: see `control_bias`.
    """
    shift = coefficient[:, None] * (reference.mean(dim=-1) - reference_mean) + reference_mean
    ratio = policy.mean(dim=-1) - shift
    return ratio[:, 0] - ratio[:, 1]


def control_bias(coefficient: Tensor, mean_error: Tensor) -> Tensor:
    """By how much a margin may be off at one standard error of the reference's stored means: |1 - c| sqrt(sum of
    squares over the sides of mean_error [pairs, sides]). # [pairs]"""
    return (1 - coefficient).abs() * mean_error.square().sum(dim=-1).sqrt()


def allocate_draws(spread: np.ndarray, total: int, block: int) -> np.ndarray:
    """Draws for each pair, in whole blocks, at least one, `total` together, in proportion to its standard deviation.

    Neyman's allocation (1934): it minimises the mean variance at a fixed total. # int [pairs]
    """
    blocks = total // block
    assert blocks >= len(spread), f"{total} draws in blocks of {block} for {len(spread)} pairs: one block each at least"
    spread = np.maximum(np.asarray(spread, dtype=np.float64), 0.0)
    counts = np.ones(len(spread), dtype=int)
    for _ in range(blocks - len(spread)):
        # the block that lowers sum(spread^2 / count) most
        counts[np.argmax(spread**2 / (counts * (counts + 1)))] += 1
    return counts * block


def upper_bound(token_logps: Tensor, is_masked: Tensor, weights: Tensor, gamma: float = 1.0) -> Tensor:
    """SPG's score for responses to be made less likely: sum_i 1/gamma log mean over contexts of p_i^gamma. # scalar

    token_logps, is_masked (bool) and weights: [draws, L]. The contexts of a token are the draws that mask
    it, in proportion to their weights. By Jensen the value lies above the ELBO, which is the same with gamma -> 0 (SPG
    2510.09541: above log pi, up to a constant of the discretisation). From few draws it is biased: the logarithm is
    outside the mean. A token that no draw masks is left out, as if certain; `balanced` and `complement` mask them all.
    """
    share = torch.where(is_masked, weights, 0.0)  # [draws, L]
    total = share.sum(dim=0)
    mean = (share * (gamma * token_logps).exp()).sum(dim=0)[total > 0] / total[total > 0]
    return mean.log().sum() / gamma


def mixture(elbo: Tensor, upper: Tensor, share: float) -> Tensor:
    """SPG's mixture of the two scores: share * upper + (1 - share) * elbo."""
    return share * upper + (1 - share) * elbo
