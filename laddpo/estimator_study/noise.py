"""How noisy a pair's score, loss and gradient are when only the masks change: VRPO's protocol, for rows of SETTINGS.

A trained policy, its reference and pairs go in (two passes: reference values first, then the policy with gradients);
per pair and setting, variances over re-evaluations with fresh noise seeds come out, with intervals over pairs and their
evaluations. All settings are compared at one loss, one beta and equal forwards of the policy.

Source: VRPO (2505.19223) table 2: 128 pairs, 8 independent re-evaluations of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item, Objective, accumulate_gradient, score_items
from laddpo.core.objectives import DpoObjective, score_variance
from laddpo.core.surprise import with_surprising
from laddpo.core.tasks import pair_item
from laddpo.estimator_study.intervals import Intervals

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedPair

BASELINE = "vrpo_paper"
PAIRS_AT_ONCE = 32  # pairs scored together
SEED_STEP = 1 << 32  # between the noise seeds of two re-evaluations: far from any seed that trains


@dataclass(frozen=True)
class Setting:
    """A row of SETTINGS: a way to spend n forwards per response. `common`: policy and reference see the same masks.
    `needs_blocks`: it is a row of its own for block-diffusion models alone."""

    estimator: ElboEstimator
    common: bool = True
    needs_blocks: bool = False

    def of(self, draws: int, seed: int, evaluation: int, block_length: int) -> ElboEstimator:
        """The policy's estimator with `draws` draws in re-evaluation `evaluation`. `block_length` of the model."""
        own_seed = seed + (evaluation + 1) * SEED_STEP
        return replace(self.estimator, diffusion_samples=draws, seed=own_seed, block_length=block_length)

    def reference(self, estimator: ElboEstimator) -> ElboEstimator:
        """The reference's."""
        return estimator if self.common else replace(estimator, stream="/reference")


@dataclass(frozen=True)
class Measured:
    """One setting at one number of draws n. E evaluations, P pairs, G of them with gradients.

    `estimator`: that of evaluation 0; `tokens` [P, 2]: response lengths; `policy` and `reference`: per-draw values,
    float64 [E, P, 2, n]; `losses` [E, P]; `gradient` [G]: trace of the covariance, over the trainable parameters, of a
    pair's loss gradient; `gradient_mean` [G]: squared length of its mean, its own noise taken off; `gradient_length`
    [G]: mean of its squared length; `gradient_products` [G, G]: of the pairs' means with one another.
    """

    name: str
    draws: int
    estimator: ElboEstimator
    tokens: np.ndarray
    policy: np.ndarray
    reference: np.ndarray
    losses: np.ndarray
    gradient: np.ndarray
    gradient_mean: np.ndarray
    gradient_length: np.ndarray
    gradient_products: np.ndarray

    def scores(self, beta: float) -> np.ndarray:
        """beta times the margin. # [E, P]"""
        ratio = (self.policy - self.reference).mean(axis=-1)
        return beta * (ratio[..., 0] - ratio[..., 1])

    def estimator_of(self, evaluation: int) -> ElboEstimator:
        """The policy's estimator in that re-evaluation."""
        return replace(self.estimator, seed=self.estimator.seed + evaluation * SEED_STEP)


def favouring(
    reference: Denoiser, pairs: Sequence[EncodedPair], setting: Setting, seed: int, token_budget: int | TokenBudget
) -> Sequence[EncodedPair]:
    """The pairs as the setting takes them: with the tokens that surprise the reference, if masks favour these."""
    if not setting.estimator.surprise_focus:
        return pairs
    estimator = replace(setting.estimator, seed=seed, block_length=reference.block_length)
    return with_surprising(reference, pairs, estimator, token_budget)


@dataclass(frozen=True)
class AtStart:
    """The objective where training starts: the policy is the reference, so their values of every draw are equal."""

    objective: DpoObjective

    def losses(self, items: Sequence[Item], draws: Tensor) -> Tensor:
        """Loss per pair. # float64 [items]"""
        values = draws.detach().cpu().numpy()
        same = [replace(item, reference=own) for item, own in zip(items, values, strict=True)]
        return self.objective.losses(same, draws)

    def coefficient_groups(self, sides: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        return self.objective.coefficient_groups(sides, draws)


def noise_items(pairs: Sequence[EncodedPair], estimator: ElboEstimator, reference: np.ndarray | None) -> list[Item]:
    """The pairs under the estimator's first draws. # reference [pairs, 2, draws]"""
    draws = estimator.draw_indices(0)
    values = reference if reference is not None else [None] * len(pairs)
    return [pair_item(pair, estimator, draws, value) for pair, value in zip(pairs, values, strict=True)]


def reference_values(
    denoiser: Denoiser,
    pairs: Sequence[EncodedPair],
    setting: Setting,
    draws: int,
    seed: int,
    evaluations: int,
    token_budget: int | TokenBudget,
    advance: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """The reference model's per-draw values in every re-evaluation. # float64 [evaluations, pairs, 2, draws]"""
    values = []
    for evaluation in range(evaluations):
        estimator = setting.reference(setting.of(draws, seed, evaluation, denoiser.block_length))
        values.append(_score(denoiser, noise_items(pairs, estimator, None), token_budget))
        advance()
    return np.stack(values)


def measure(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    pairs: Sequence[EncodedPair],
    name: str,
    setting: Setting,
    draws: int,
    seed: int,
    evaluations: int,
    reference: np.ndarray | None,
    objective: DpoObjective,
    gradient_pairs: int,
    token_budget: int | TokenBudget,
    advance: Callable[[], object] = lambda: None,
) -> Measured:
    """The policy under the masks of `reference`, whose values are float64 [evaluations, pairs, 2, draws].

    Without `reference` the policy is the reference: its scores are exactly 0 under every mask.
    """
    spread = GradientSpread(gradient_pairs)
    policy, losses = [], []
    for evaluation in range(evaluations):
        estimator = setting.of(draws, seed, evaluation, denoiser.block_length)
        items = noise_items(pairs, estimator, None if reference is None else reference[evaluation])
        goal = AtStart(objective) if reference is None else objective
        found = [
            spread.add(i, denoiser, parameters, item, goal, token_budget)
            for i, item in enumerate(items[:gradient_pairs])
        ]
        found = np.stack([*found, *_score(denoiser, items[gradient_pairs:], token_budget)])
        policy.append(found)
        losses.append(goal.losses(items, torch.from_numpy(found)).numpy())
        advance()
    tokens = np.array([(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs])
    values = np.stack(policy), np.stack(policy) if reference is None else reference, np.stack(losses)
    first = setting.of(draws, seed, 0, denoiser.block_length)
    return Measured(name, draws, first, tokens, *values, *spread.traces(), *spread.lengths())


class GradientSpread:
    """Mean and variance of each pair's gradient over re-evaluations, with one vector per pair in memory."""

    def __init__(self, pairs: int):
        self.sums: list[Tensor | None] = [None] * pairs
        self.squares = np.zeros(pairs)
        self.counts = np.zeros(pairs, dtype=int)

    def add(
        self,
        index: int,
        denoiser: Denoiser,
        parameters: Sequence[Tensor],
        item: Item,
        objective: Objective,
        token_budget: int | TokenBudget,
    ) -> np.ndarray:
        """One more evaluation of pair `index`; its per-draw values. # float64 [2, draws]"""
        for parameter in parameters:
            parameter.grad = None
        values = accumulate_gradient(denoiser, parameters, [item], objective, 1.0, token_budget)
        self.add_gradient(index, parameters)
        return values.draws[0].cpu().numpy()

    def add_gradient(self, index: int, parameters: Sequence[Tensor]) -> None:
        """The gradient in `parameter.grad`, which is cleared."""
        vector = torch.cat([_flat_gradient(parameter) for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
        vector = vector.to("cpu", torch.promote_types(vector.dtype, torch.float32))
        self.squares[index] += _product(vector, vector)
        self.counts[index] += 1
        self.sums[index] = vector if self.sums[index] is None else self.sums[index].add_(vector)

    def traces(self) -> tuple[np.ndarray, np.ndarray]:
        """Trace of the covariance, and the squared length of the mean without its part that is noise. # [pairs]"""
        lengths = np.array([_product(total, total) for total in self.sums])
        trace = (self.squares - lengths / self.counts) / (self.counts - 1)
        return trace, lengths / self.counts**2 - trace / self.counts

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean squared length of each pair's gradient [pairs]; products of the pairs' means [pairs, pairs]."""
        products = np.zeros((len(self.sums), len(self.sums)))
        for i, a in enumerate(self.sums):
            for j, b in enumerate(self.sums[: i + 1]):
                products[i, j] = products[j, i] = _product(a, b)
        return self.squares / self.counts, products / np.outer(self.counts, self.counts)


def summarise(measured: Sequence[Measured], beta: float, rng: np.random.Generator) -> list[dict]:
    """A row of the table for each: variances with 95% intervals, their ratios to BASELINE at equal draws, calibration.

    `score`, `loss`, `gradient`: {"value", "interval"}, with {"ratio", "ratio_interval"} to the baseline, pair by pair;
    both are None where the baseline has no variance.
    `elbo`: variance of B_theta(y_w) alone. `own_estimate`: mean of V as each pair's own draws estimate it, over V.
    """
    baselines = {m.draws: per_pair(m, beta) for m in measured if m.name == BASELINE}
    of_size = {size: Intervals(size, rng) for size in {len(v) for m in measured for v in per_pair(m, beta).values()}}
    rows = []
    for m in measured:
        row: dict = {"setting": m.name, "draws": m.draws}
        for name, values in per_pair(m, beta).items():
            row[name] = compared(values, None, of_size[len(values)])
            if m.draws in baselines and m.name != BASELINE:
                found = compared(values, baselines[m.draws][name], of_size[len(values)])
                row[name] |= {"ratio": found["value"], "ratio_interval": found["interval"]}
        row["gradient_signal"] = float(m.gradient_mean.mean())
        row["own_estimate"] = own_estimate(m, beta)
        rows.append(row)
    return rows


def compared(values: np.ndarray, base: np.ndarray | None, intervals: Intervals) -> dict:
    """{"value", "interval"} of mean(values), or of its ratio to mean(base). # [pairs]"""
    value, interval = intervals.of(lambda s: s.mean(values) if base is None else s.mean(values) / s.mean(base))
    return {"value": value, "interval": interval}


def per_pair(measured: Measured, beta: float) -> dict[str, np.ndarray]:
    """Variances over re-evaluations. # each [pairs]"""
    return {
        "score": measured.scores(beta).var(axis=0, ddof=1),
        "loss": measured.losses.var(axis=0, ddof=1),
        "gradient": measured.gradient,
        "elbo": measured.policy[:, :, 0].mean(axis=-1).var(axis=0, ddof=1),
    }


def own_estimate(measured: Measured, beta: float) -> float | None:
    """Mean of the variance that single evaluations estimate from their own draws, over the measured one."""
    block = measured.estimator.block
    if measured.draws < 2 * block:
        return None
    items = [Item("", (), reference) for reference in measured.reference.reshape(-1, 2, measured.draws)]
    policy = torch.from_numpy(measured.policy.reshape(-1, 2, measured.draws))
    truth = measured.scores(beta).var(axis=0, ddof=1).mean()
    return float(score_variance(items, policy, beta, block).mean() / truth) if truth else None


def drift(measured: Measured) -> dict[str, dict[str, float]]:
    """How far training moved the ELBO of both responses, in nats: mean over pairs with its standard error."""
    ratio = (measured.policy - measured.reference).mean(axis=(0, 3))  # [pairs, 2]
    error = ratio.std(axis=0, ddof=1) / len(ratio) ** 0.5
    reference = measured.reference.mean(axis=(0, 1, 3))
    return {
        side: {"moved": float(ratio[:, i].mean()), "std_error": float(error[i]), "reference": float(reference[i])}
        for i, side in enumerate(("chosen", "rejected"))
    }


def ratio_of(values: np.ndarray, base: np.ndarray) -> float | None:
    """mean(values) / mean(base); None where that is a division by 0."""
    below = float(base.mean())
    return float(values.mean()) / below if below else None


def _score(denoiser: Denoiser, items: Sequence[Item], token_budget: int | TokenBudget) -> np.ndarray:
    """Per-draw values of any number of items. # float64 [items, 2, draws]"""
    if not items:
        return np.zeros((0, 2, 0))
    parts = [
        score_items(denoiser, items[start : start + PAIRS_AT_ONCE], token_budget).cpu().numpy()
        for start in range(0, len(items), PAIRS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _flat_gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
    return parameter.grad.detach().flatten()


def _product(a: Tensor, b: Tensor) -> float:
    """a @ b, summed in float64 without a copy of both in it."""
    step = 1 << 20
    return sum(float(a[i : i + step].double() @ b[i : i + step].double()) for i in range(0, len(a), step))


def _rows() -> dict[str, Setting]:
    published = ElboEstimator("count", "iid", shared_counts=False)
    complement = replace(published, estimator="complement", schedule="low_discrepancy")
    balanced = replace(published, estimator="balanced", schedule="low_discrepancy")
    default = replace(balanced, shared_counts=True, difference_focus=0.5)
    surprise = replace(balanced, surprise_focus=0.5)
    return {
        "naive": Setting(published, common=False),
        "one time, many masks": Setting(replace(published, schedule="single")),
        "one time a draw for all blocks": Setting(replace(published, schedule="one_per_draw"), needs_blocks=True),
        BASELINE: Setting(published),
        "+ stratified": Setting(replace(published, schedule="stratified")),
        "+ systematic": Setting(replace(published, schedule="systematic")),
        "+ low discrepancy": Setting(replace(published, schedule="low_discrepancy")),
        "+ shared counts": Setting(replace(published, shared_counts=True)),
        "+ shared counts and masks": Setting(replace(published, shared_counts=True, shared_masks=True)),
        "+ complement": Setting(replace(published, estimator="complement")),
        "+ focus": Setting(replace(published, difference_focus=0.5)),
        "complement, low discrepancy": Setting(complement),
        "complement, low discrepancy, shared counts": Setting(replace(complement, shared_counts=True)),
        "complement, low discrepancy, focus": Setting(replace(complement, difference_focus=0.5)),
        "balanced, low discrepancy": Setting(balanced),
        "balanced, low discrepancy, focus": Setting(replace(balanced, difference_focus=0.5)),
        "balanced, low discrepancy, surprise": Setting(surprise),
        "balanced, low discrepancy, surprise, tilt 0.5": Setting(replace(surprise, count_tilt=0.5)),
        "default": Setting(default),
        "default, tilt 0.2": Setting(replace(default, count_tilt=0.2)),
        "default, tilt 0.5": Setting(replace(default, count_tilt=0.5)),
        "default, focus 0.75": Setting(replace(default, difference_focus=0.75)),
        "default, shared masks": Setting(replace(default, shared_masks=True)),
    }


SETTINGS: Mapping[str, Setting] = _rows()
