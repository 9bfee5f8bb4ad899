"""Learning from single completions with a label, good or bad: KTO (2402.01306) on the ELBO (ELBO-KTO, 2510.23658).

A completion's loss compares its reward beta * (B_theta - B_ref) with a baseline that all completions of a step share.
The baseline is a number without gradient, so the streamed gradient stays exact: it is known before the first backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from laddpo.core.gradient import Item
from laddpo.core.losses import LOSSES, CompletionScores, LossOptions, completion_loss
from laddpo.core.metrics import accuracy, to_floats
from laddpo.core.objectives import mean_variance, reference_draws
from laddpo.errors import UserError

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedCompletion

MISMATCHED, BATCH_MEAN = "mismatched", "batch_mean"  # dpo.kl_baseline
PARTNERS_TRIED = 1000  # rows looked at before a completion is cut to fit behind a long prompt


@dataclass(frozen=True)
class CompletionObjective:
    """A loss of single completions. `baseline` in nats, in common for all items; `kl_baseline` says what it is.

    An item of two sides is a preference pair: its chosen side counts as good, the rejected one as bad, and its loss is
    the mean of both.
    """

    loss: str
    options: LossOptions
    kl_baseline: str = MISMATCHED
    baseline: float = 0.0

    @property
    def beta(self) -> float:
        """The factor of the rewards."""
        return self.options.beta

    @property
    def of_ratios(self) -> CompletionObjective:
        """The part that sees the policy through its ratio to the reference alone."""
        return replace(self, options=replace(self.options, sft_weight=0.0))

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def has_baseline(self) -> bool:
        return LOSSES[self.loss].has_baseline

    def losses(self, items: Sequence[Item], draws: Tensor) -> Tensor:
        """Loss per item. # float64 [items]"""
        facts = [(item.weight, *item.response_tokens) for item in items]
        facts = torch.tensor(facts, dtype=torch.float64, device=draws.device)
        scores = CompletionScores(
            policy=draws.mean(dim=-1),
            reference=reference_draws(items, draws.device).mean(dim=-1),
            labels=labels_of(items).to(draws.device),
            tokens=facts[:, 1:],
            weights=facts[:, :1],
        )
        return completion_loss(self.loss, scores, self.options, self.baseline).mean(dim=-1)

    def coefficient_groups(self, sides: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """The draws of a side share dL/dB."""
        side = np.repeat(np.arange(sides)[:, None], draws, axis=1)
        return side, np.ones_like(side)

    def at_baseline_of(self, items: Sequence[Item], draws: Tensor) -> CompletionObjective:
        """This objective with the mean ratio of these items as its baseline. # draws float64 [items, sides, draws]

        ELBO-KTO takes the mean of the step's own completions. KTO takes that of mismatched completions, which estimates
        a KL divergence: it is clamped at 0, as in TRL.
        """
        mean = float((draws - reference_draws(items, draws.device)).mean())
        return replace(self, baseline=mean if self.kl_baseline == BATCH_MEAN else max(0.0, mean))


def labels_of(items: Sequence[Item]) -> Tensor:
    """Which sides are good. # bool [items, sides]"""
    return torch.tensor([[item.label] if item.label is not None else [True, False] for item in items])


def completion_metrics(
    items: Sequence[Item], draws: Tensor, losses: Tensor, objective: CompletionObjective, block: int = 1
) -> dict[str, float]:
    """Means over the completions of one step or one evaluation, under the names that pairs have.

    `chosen` are the good completions, `rejected` the bad ones; what one of them lacks is NaN. `rewards/accuracies` is
    the share of all (good, bad) couples in which the good one has the higher reward, a tie counting half: the area
    under the ROC curve, 0.5 of an untrained policy. `kl` is the mean of policy minus reference, `kl/baseline` what the
    loss takes for it.
    """
    labels, beta = labels_of(items)[:, 0].to(draws.device), objective.beta
    policy = draws.mean(dim=-1)[:, 0]
    rewards = beta * (policy - reference_draws(items, draws.device).mean(dim=-1)[:, 0])
    good, bad = rewards[labels], rewards[~labels]
    metrics = {
        "loss": losses.mean(),
        "rewards/chosen": good.mean(),
        "rewards/rejected": bad.mean(),
        "rewards/margins": good.mean() - bad.mean(),
        "rewards/accuracies": ordered_share(good, bad),
        "logps/chosen": policy[labels].mean(),
        "logps/rejected": policy[~labels].mean(),
        "kl": rewards.mean() / beta,
    }
    if objective.has_baseline:
        metrics["kl/baseline"] = torch.tensor(objective.baseline)
    if draws.shape[-1] // block > 1:
        metrics["elbo/std_error"] = mean_variance(draws, block).mean().sqrt()
        ratio = draws - reference_draws(items, draws.device)
        metrics["score/variance"] = mean_variance(beta * ratio, block).mean()
    return to_floats({name: value.to(draws.device) for name, value in metrics.items()})


def ordered_share(good: Tensor, bad: Tensor) -> Tensor:
    """Share of the couples (good, bad) in which the good one is larger; a tie counts half. NaN without couples."""
    return accuracy(good[:, None] - bad[None, :]).mean()


class Mismatched(Sequence):
    """The rows with another row's completion behind each prompt: what KTO estimates its baseline from.

    The partner of a row is the next row of another prompt in the order of hashed ids, so it depends on which rows there
    are and on nothing else. It must fit: prompt and completion are at most as long together as the longest row.
    """

    def __init__(self, rows: Sequence[EncodedCompletion]):
        self._rows = rows
        facts = [(row.id, row.group, len(row.prompt_ids), len(row.completion_ids)) for row in rows]
        ids, groups = [fact[0] for fact in facts], [fact[1] for fact in facts]
        self._lengths = np.array([fact[2:] for fact in facts]).reshape(-1, 2)
        if len(set(groups)) < 2:
            raise UserError(
                f"dpo.kl_baseline is {MISMATCHED!r}, which puts completions behind the prompts of others, and the "
                f"training rows have {len(set(groups))} prompt. Set dpo.kl_baseline={BATCH_MEAN}, or give rows of "
                "several prompts."
            )
        self._longest = int(self._lengths.sum(axis=1).max())
        order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
        self._partners = np.zeros(len(rows), dtype=np.int64)
        for place, i in enumerate(order):
            others = (order[(place + step) % len(order)] for step in range(1, len(order)))
            self._partners[i] = self._partner(i, (other for other in others if groups[other] != groups[i]))

    def _partner(self, i: int, others: Iterator[int]) -> int:
        """The first of `others` whose completion fits behind the prompt of row i; else the first, which is cut."""
        room, first = self._longest - self._lengths[i, 0], next(others)
        fitting = (other for other in islice(chain([first], others), PARTNERS_TRIED) if self._lengths[other, 1] <= room)
        return next(fitting, first)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> EncodedCompletion:
        row, other = self._rows[index], self._rows[int(self._partners[index])]
        room = self._longest - len(row.prompt_ids)
        name = hashlib.sha256(other.id.encode()).hexdigest()[:16]
        return replace(row, id=f"{row.id}~{name}", completion_ids=other.completion_ids[-room:])
