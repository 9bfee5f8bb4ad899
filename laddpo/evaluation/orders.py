"""Which open positions of a block a step commits: the rows of REMASKING, and how many at a time.

In: logits of the open positions of several items, packed [R, V], and what was drawn there. Out: a number for each
position; the highest are committed first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """Which open positions are committed first: those of the highest `confidence`. `top_k`: tokens that are drawn from
    and count in it, None for all. `is_timed`: how many a step commits follows Dream's times."""

    confidence: Callable[[Tensor, Tensor, list[torch.Generator], list[int]], Tensor]
    top_k: int | None = None
    is_timed: bool = False

    def commits(self, block_length: int, steps: int) -> list[int]:
        """How many tokens each step of one block commits; steps without any are left out."""
        counts = timed_commits(block_length, steps) if self.is_timed else even_commits(block_length, steps)
        return [count for count in counts if count]


def draw(scores: Tensor, temperature: float, generators, rows_per_item: list[int]) -> Tensor:
    """argmax of scores + temperature * Gumbel noise, in float64: float32 noise thins out the tails (2409.02908)."""
    if temperature == 0:
        return scores.argmax(-1)
    tokens = []
    for part, generator in zip(scores.split(rows_per_item), generators, strict=True):
        uniform = torch.rand(part.shape, generator=generator, dtype=torch.float64, device=part.device)
        tokens.append((part.double() - temperature * (-uniform.log()).log()).argmax(-1))
    return torch.cat(tokens)


def even_commits(block_length: int, steps: int) -> list[int]:
    """As equal as possible, the earlier steps one more."""
    base, more = divmod(block_length, steps)
    return [base + (step < more) for step in range(steps)]


def timed_commits(block_length: int, steps: int) -> list[int]:
    """Of the tokens that are open at time t, the share 1 - s / t by the next time s; all at the last step. Times go
    evenly from 1 to 0.001 (Dream's generation)."""
    times = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)
    commits, left = [], block_length
    for step in range(steps):
        count = left if step == steps - 1 else int(left * (1 - times[step + 1] / times[step]))
        commits.append(count)
        left -= count
    return commits


def _low_confidence(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    """log p(token), without noise."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _certainty(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    """log p of the most likely token, whatever was drawn."""
    return logits.amax(-1) - logits.logsumexp(-1)


def _negative_entropy(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    probabilities = logits.softmax(-1)
    return (probabilities * (probabilities + 1e-10).log()).sum(-1)


def _margin(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    """Between the probabilities of the two best tokens."""
    first, second = logits.softmax(-1).topk(2).values.unbind(-1)
    return first - second


def _random(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    return torch.cat(
        [
            torch.rand(rows, generator=generator, device=logits.device)
            for rows, generator in zip(rows_per_item, generators, strict=True)
        ]
    )


def _leftmost(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    """0 at the leftmost open position of an item, lower the farther to the right."""
    return torch.cat([-torch.arange(rows, device=logits.device, dtype=logits.dtype) for rows in rows_per_item])


DREAM = {"top_k": 50, "is_timed": True}  # what Dream's generation does where nothing is said
REMASKING = {
    "low_confidence": Order(_low_confidence),
    "certainty": Order(_certainty),
    "random": Order(_random),
    "sequential": Order(_leftmost),
    "maskgit_plus": Order(_low_confidence, **DREAM),
    "entropy": Order(_negative_entropy, **DREAM),
    "topk_margin": Order(_margin, **DREAM),
}
