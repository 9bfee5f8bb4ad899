"""The tokens that surprise the reference most: what `surprise_focus` makes the masks favour.

A mask that hides such a token has most of a pair's gradient: one wrong digit can own nearly all of it. How surprising a
token is, is told by draws of a stream of their own, so that the masks of training are independent of the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from laddpo.core.budget import TokenBudget
from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import Denoiser, pack_sequences
from laddpo.core.gradient import Item, longest_sequence, pack_sequence_runs
from laddpo.core.tasks import pair_item

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedPair

STREAM = "/surprise"


def surprise_estimator(e: ElboEstimator) -> ElboEstimator:
    """The draws that tell surprising tokens: masks and inverses, each pair of which hides every token."""
    return ElboEstimator(
        "complement",
        diffusion_samples=e.surprise_draws,
        seed=e.seed,
        shared_counts=False,
        stream=STREAM,
        block_length=e.block_length,
    )


def surprising_positions(sums: np.ndarray, counts: np.ndarray, share: float) -> np.ndarray:
    """The share of a response's tokens with the largest mean, at least one; of equals the first. # int64, ascending

    `sums` and `counts`: of -log p over the draws that hide a token. Example: sums [1, 8, 3, 4], counts [1, 4, 1, 1] and
    a share of 0.5 -> [2, 3].
    """
    wanted = max(1, math.ceil(share * len(sums) - 1e-9))  # 0.1 * 3 is a little above 0.3
    return np.sort(np.argsort(-(sums / counts), kind="stable")[:wanted])


def with_surprising(
    denoiser: Denoiser, rows: Sequence[EncodedPair], e: ElboEstimator, token_budget: int | TokenBudget
) -> list[EncodedPair]:
    """The rows with the tokens that surprise this model, found now."""
    telling = surprise_estimator(e)
    items = [pair_item(row, telling, telling.draw_indices(0)) for row in rows]
    return [
        replace(row, favoured=tuple(surprising_positions(*side, e.surprise_share) for side in sides))
        for row, sides in zip(rows, token_surprise(denoiser, items, token_budget), strict=True)
    ]


def token_surprise(
    denoiser: Denoiser, items: Sequence[Item], token_budget: int | TokenBudget
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """By item and side: sum of -log p of every token over the draws that hide it, and their number.
    # float32 [L], int32 [L]"""
    budget = TokenBudget.of(token_budget)
    return budget.run(lambda tokens: _surprise(denoiser, items, tokens, budget.between), longest_sequence(items))


@torch.no_grad()
def _surprise(
    denoiser: Denoiser, items: Sequence[Item], token_budget: int, between: Callable[[], None]
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    sums, counts = ([[np.zeros(n) for n in item.response_tokens] for item in items] for _ in range(2))
    places, sequences = [], []
    for i in sorted(range(len(items)), key=lambda i: (items[i].tokens, i)):
        for side, draws in enumerate(items[i].sides):
            hiding = [sequence for sequence in draws if len(sequence.draw.masked)]
            places += [(i, side)] * len(hiding)
            sequences += hiding
    place = iter(places)
    for run in pack_sequence_runs(sequences, token_budget):
        between()
        logps = denoiser.token_logps(pack_sequences(run, denoiser.mask_token_id, denoiser.device))
        ends = np.cumsum([len(sequence.draw.masked) for sequence in run])
        for sequence, found in zip(run, np.split(logps.double().cpu().numpy(), ends[:-1]), strict=True):
            i, side = next(place)
            sums[i][side][sequence.draw.masked] -= found
            counts[i][side][sequence.draw.masked] += 1
    return [
        [(total.astype(np.float32), number.astype(np.int32)) for total, number in zip(*of_item, strict=True)]
        for of_item in zip(sums, counts, strict=True)
    ]
