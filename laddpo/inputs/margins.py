"""Held-out preference evaluation: reward accuracy and margins, with the errors that pairs and draws bring.

Policy and reference see the same masks. The estimator here is fixed, whatever the run was trained with, so that runs
can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.completions import CompletionObjective, completion_metrics, labels_of
from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item
from laddpo.core.metrics import accuracy, preference_metrics
from laddpo.core.objectives import DpoObjective, mean_variance, pair_scores, reference_draws
from laddpo.core.sharing import score_shared
from laddpo.errors import Stopped
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.processes.signals import StopFlag

WINDOW = 64  # pairs scored together; only rounding depends on it


def evaluation_estimator(diffusion_samples: int, seed: int, block_length: int) -> ElboEstimator:
    """The estimator that measures every run: complementary masks, evenly spread counts."""
    return ElboEstimator("complement", "low_discrepancy", diffusion_samples, seed, block_length=block_length)


@dataclass(frozen=True)
class Scores:
    """Per-draw values of a policy on held-out rows. `draws` float64 [rows, sides, draws]."""

    items: Sequence[Item]
    draws: Tensor
    objective: DpoObjective | CompletionObjective
    block: int

    @property
    def at_baseline(self) -> DpoObjective | CompletionObjective:
        """The objective. A baseline that completions share is estimated from these rows, without another forward."""
        if isinstance(self.objective, CompletionObjective) and self.objective.has_baseline:
            return self.objective.at_baseline_of(self.items, self.draws)
        return self.objective

    def losses(self) -> Tensor:
        """Loss of each row. # float64 [rows]"""
        return self.at_baseline.losses(self.items, self.draws)


@dataclass(frozen=True)
class CompletionRewards(Scores):
    """Those of completions with labels. `draws` float64 [rows, 1, draws]."""

    @property
    def labels(self) -> np.ndarray:
        """Which are good. # bool [rows]"""
        return labels_of(self.items)[:, 0].numpy()

    @property
    def rewards(self) -> np.ndarray:
        """beta * (ELBO of the policy - that of the reference). # float64 [rows]"""
        ratio = self.draws - reference_draws(self.items, self.draws.device)
        return (self.objective.beta * ratio.mean(dim=-1)[:, 0]).numpy()

    def metrics(self) -> dict[str, float]:
        """As PreferenceScores.metrics, with the names of completion_metrics."""
        metrics = completion_metrics(self.items, self.draws, self.losses(), self.at_baseline, self.block)
        good = torch.from_numpy(self.labels)
        reference = reference_draws(self.items, self.draws.device).mean(dim=-1)[:, 0]
        metrics["chosen_fall"] = metrics["rewards/chosen"] / self.objective.beta / float(reference[good].mean())
        return {f"validation/{name}": value for name, value in metrics.items()}


@dataclass(frozen=True)
class PreferenceScores(Scores):
    """Those of pairs. `draws` float64 [pairs, 2, draws]."""

    @property
    def margins(self) -> np.ndarray:
        """beta * (chosen ratio - rejected ratio). # float64 [pairs]"""
        return (self.objective.beta * pair_scores(self.items, self.draws).margin).numpy()

    @property
    def accuracies(self) -> np.ndarray:
        """1, 1/2 on an exact tie, 0. # float64 [pairs]"""
        return accuracy(torch.from_numpy(self.margins)).numpy()

    @property
    def margin_draw_error(self) -> np.ndarray | None:
        """Standard error of each pair's margin from its own draws; None where they are one block. # float64 [pairs]"""
        if self.draws.shape[-1] < 2 * self.block:
            return None
        ratio = self.draws - reference_draws(self.items, self.draws.device)
        return mean_variance(self.objective.beta * (ratio[:, 0] - ratio[:, 1]), self.block).sqrt().numpy()

    def metrics(self) -> dict[str, float]:
        """Validation metrics: those of training under `validation/`, and `chosen_fall`.

        `chosen_fall` is by how much of the reference's the chosen log-likelihood has fallen: 0.2 is 20% lower. It is
        absent without a reference.
        """
        metrics = preference_metrics(self.items, self.draws, self.losses(), self.objective.beta, self.block)
        scores = pair_scores(self.items, self.draws)
        if self.items[0].reference is not None:
            metrics["chosen_fall"] = float(scores.chosen_ratio.mean() / scores.reference_chosen.mean())
        return {f"validation/{name}": value for name, value in metrics.items()}


def score_preferences(
    denoiser: Denoiser,
    items: Sequence[Item],
    objective: DpoObjective | CompletionObjective,
    block: int,
    token_budget: int | TokenBudget,
    ranks: Ranks = ALONE,
    stop: StopFlag | None = None,
) -> PreferenceScores | CompletionRewards:
    """The policy's values on held-out pairs or completions, whose items carry the reference's; several ranks share them
    out.

    Raises `Stopped` as `score_windows` does.
    """
    parts = [draws.cpu() for _, draws in score_windows(denoiser, items, token_budget, ranks, stop)]
    return _scores(items, torch.cat(parts), objective, block)


def scores_of_reference(
    items: Sequence[Item], objective: DpoObjective | CompletionObjective, block: int
) -> PreferenceScores | CompletionRewards:
    """What score_preferences would give for the reference itself, from the values that the items carry."""
    return _scores(items, reference_draws(items, torch.device("cpu")), objective, block)


def _scores(
    items: Sequence[Item], draws: Tensor, objective: DpoObjective | CompletionObjective, block: int
) -> PreferenceScores | CompletionRewards:
    kind = PreferenceScores if items[0].label is None else CompletionRewards
    return kind(items, draws, objective, block)


def score_windows(
    denoiser: Denoiser,
    items: Sequence[Item],
    token_budget: int | TokenBudget,
    ranks: Ranks = ALONE,
    stop: StopFlag | None = None,
) -> Iterator[tuple[Sequence[Item], Tensor]]:
    """Items a window at a time, with their per-draw values; several ranks share them out.

    Raises `Stopped` after a signal, before the next micro-step; several ranks stop together, before the next window.
    """
    budget = TokenBudget.of(token_budget)
    with budget.stoppable(stop, ranks):
        for start in range(0, len(items), WINDOW):
            if start and stop is not None and ranks.agree_to_stop(stop):
                raise Stopped(f"scoring held-out rows: stopped by {stop.name}.", "Give the command again.")
            window = items[start : start + WINDOW]
            yield window, score_shared(denoiser, window, budget, ranks)


def length_buckets(scores: PreferenceScores, buckets: int = 4) -> list[dict[str, Any]]:
    """Reward accuracy and margin by tokens of chosen plus rejected, in equally filled buckets."""
    tokens = np.array([sum(item.response_tokens) for item in scores.items])
    order = np.argsort(tokens, kind="stable")
    rows = []
    for part in np.array_split(order, min(buckets, len(order))):
        rows.append(
            {
                "tokens": [int(tokens[part].min()), int(tokens[part].max())],
                "pairs": len(part),
                "reward_accuracy": float(scores.accuracies[part].mean()),
                "margin": float(scores.margins[part].mean()),
            }
        )
    return rows
