"""The result on held-out completions with labels: how well rewards tell the good ones from the bad ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from laddpo.core.metrics import accuracy
from laddpo.core.objectives import reference_draws
from laddpo.inputs.margins import CompletionRewards
from laddpo.preference.encoding.encode import EncodedCompletion
from laddpo.results.stats import compare, mean_with_error, normal_quantile, wilson_interval


def labelled_results(
    scores: CompletionRewards, rows: Sequence[EncodedCompletion], seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Entries of results.json, and a record of each row. Where all rows have one label, nothing can be told apart; with
    one prompt of a label, no interval is known."""
    groups = [row.group for row in rows]
    good, rewards = scores.labels, scores.rewards
    policy = scores.draws.mean(dim=-1)[:, 0].numpy()
    reference = reference_draws(scores.items, scores.draws.device).mean(dim=-1)[:, 0].numpy()
    found: dict[str, Any] = {}
    if good.any() and not good.all():
        prompts = min(len({group for group, own in zip(groups, side, strict=True) if own}) for side in (good, ~good))
        (share, share_error), (margin, margin_error) = (
            of_rows(rewards, good, groups) for of_rows in (ordered_share, mean_difference)
        )
        interval = _around(share, share_error, prompts)
        if prompts > 1 and share in (0.0, 1.0):  # no spread is no certainty
            interval = wilson_interval(share * prompts, prompts)
        elif interval:
            interval = (max(interval[0], 0.0), min(interval[1], 1.0))
        found["reward_accuracy"] = _entry(0.5, share, interval, len(rows))
        found["reward_margin"] = _entry(0.0, margin, _around(margin, margin_error, prompts), len(rows))
    for side, of_side in (("chosen", good), ("rejected", ~good)):
        if of_side.any():
            own = [group for group, is_own in zip(groups, of_side, strict=True) if is_own]
            own = None if len(set(own)) == len(own) else own
            values = (list(reference[of_side]), list(policy[of_side]))
            found[f"logps_{side}"] = compare(*values, np.random.default_rng(seed), own, is_share=False)
    records = [
        {"id": row.id, "label": row.label, "reward": float(reward), "response_tokens": list(item.response_tokens)}
        for row, reward, item in zip(rows, rewards, scores.items, strict=True)
    ]
    return found, records


def ordered_share(rewards: np.ndarray, good: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """(share of couples (good, bad) in which the good one has the higher reward, its standard error); ties count half.

    The area under the ROC curve. Its error is DeLong's (1988), from each row's share of couples won, with the rows of
    a group taken together.
    """
    won = accuracy(torch.from_numpy(rewards[good][:, None] - rewards[~good])).numpy()  # [good, bad]
    shares, share = np.empty(len(rewards)), float(won.mean())
    shares[good], shares[~good] = won.mean(axis=1), won.mean(axis=0)
    return share, _error((shares - share) / np.where(good, good.sum(), (~good).sum()), groups)


def mean_difference(rewards: np.ndarray, good: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """(mean reward of good rows minus that of bad ones, its standard error with the rows of a group together)."""
    means = rewards[good].mean(), rewards[~good].mean()
    parts = np.where(good, (rewards - means[0]) / good.sum(), -(rewards - means[1]) / (~good).sum())
    return float(means[0] - means[1]), _error(parts, groups)


def _error(parts: np.ndarray, groups: Sequence[str]) -> float:
    """Standard error of a sum of parts whose groups are independent; NaN for one group."""
    return mean_with_error(len(parts) * parts, groups).std_error


def _around(value: float, error: float, prompts: int) -> tuple[float, float] | None:
    """The normal 95% interval; None without spread, or with one prompt of a label."""
    reach = normal_quantile(0.95) * error
    return (value - reach, value + reach) if error and prompts > 1 else None


def _entry(base: float, tuned: float, interval: tuple[float, float] | None, items: int) -> Mapping[str, Any]:
    """As results.stats.compare makes it: `base` follows from the definition, and is not measured."""
    return {
        "base": base,
        "tuned": tuned,
        "difference": tuned - base,
        "interval": [bound - base for bound in interval] if interval else None,
        "items": items,
        "base_interval": [base, base],
        "tuned_interval": list(interval) if interval else None,
    }
