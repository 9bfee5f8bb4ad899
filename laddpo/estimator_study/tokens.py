"""How much of a pair's gradient one token makes: exact, one backward pass for every token of a few pairs.

A token enters the score by its log-probability times its weights over the draws that mask it. Its part of the gradient
is the gradient of that product; the share of a token is the squared length of its part over the sum of those of all
tokens of both responses. The loss scales all parts alike, so it has no say. A wrong digit that the reference finds very
unlikely can have a hundred times the next token's share, and then a step's gradient is noise about one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import Denoiser, pack_sequences
from laddpo.core.gradient import Item
from laddpo.estimator_study.noise import noise_items

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedPair

FLAGGED = 0.5  # of a pair's gradient: what a page lists
SIDES = ("chosen", "rejected")


def token_values(denoiser: Denoiser, item: Item) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each side: log p of every token, whether it is masked, and its weight. # [draws, L] each

    The whole item in one forward; differentiable.
    """
    sequences = [sequence for sequence in item.sequences if sequence.tokens]
    logps = denoiser.token_logps(pack_sequences(sequences, denoiser.mask_token_id, denoiser.device)).double()
    sides, start = [], 0
    for side in item.sides:
        length = len(side[0].response_ids)
        rows, hidden = [], torch.zeros(len(side), length, dtype=torch.bool, device=logps.device)
        weights = torch.zeros(len(side), length, dtype=torch.float64, device=logps.device)
        for k, sequence in enumerate(side):
            masked = torch.as_tensor(sequence.draw.masked, device=logps.device)
            hidden[k, masked] = True
            weights[k, masked] = torch.as_tensor(sequence.draw.token_weights, device=logps.device)
            rows.append(logps.new_zeros(length).index_put((masked,), logps[start : start + len(masked)]))
            start += len(masked)
        sides.append((torch.stack(rows), hidden, weights))
    return sides


def mean_logps(denoiser: Denoiser, pairs: Sequence[EncodedPair], estimator: ElboEstimator) -> list[list[np.ndarray]]:
    """For each pair and side, the mean log-probability of every token over the draws that mask it; NaN if none does."""
    found = []
    with torch.no_grad():
        for item in noise_items(pairs, estimator, None):
            sides = zip(item.sides, item.response_tokens, strict=True)
            found.append([_mean_over_draws(_draws_of(denoiser, side), length) for side, length in sides])
    return found


def token_shares(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    pairs: Sequence[EncodedPair],
    estimator: ElboEstimator,
    reference: Sequence[Sequence[np.ndarray]],
    advance: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """The token with the largest share of each pair's gradient. `reference`: `mean_logps` of the reference.

    The graphs of one response's draws are held together, and every token walks back through those that mask it.
    """
    found = []
    for pair, item, logps in zip(pairs, noise_items(pairs, estimator, None), reference, strict=True):
        sides = zip(item.sides, item.response_tokens, strict=True)
        parts = [_squared_lengths(_draws_of(denoiser, side), length, parameters) for side, length in sides]
        total = sum(float(part.sum()) for part in parts)
        side = int(np.argmax([part.max() for part in parts]))
        position = int(parts[side].argmax())
        ids = (pair.chosen_ids, pair.rejected_ids)[side]
        value = logps[side][position]
        found.append(
            {
                "pair": pair.id,
                "share": float(parts[side][position] / total) if total else None,
                "side": SIDES[side],
                "position": position,
                "token_id": int(ids[position]),
                "before": [int(token) for token in ids[max(0, position - 6) : position]],
                "reference_logp": float(value) if np.isfinite(value) else None,
                "tokens": sum(map(len, parts)),
            }
        )
        advance()
    return found


def _draws_of(denoiser: Denoiser, side: Sequence) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`token_values` of each draw in a graph of its own: a token's backward leaves the others alone. # [1, L]"""
    items = [Item("", ((sequence,),)) for sequence in side if len(sequence.draw.masked)]
    return [token_values(denoiser, item)[0] for item in items]


def _mean_over_draws(draws: Sequence[tuple[Tensor, Tensor, Tensor]], length: int) -> np.ndarray:
    if not draws:
        return np.full(length, np.nan)
    logps, hidden, _ = (torch.cat(part) for part in zip(*draws, strict=True))
    return ((logps * hidden).sum(dim=0) / hidden.sum(dim=0)).cpu().numpy()


def _squared_lengths(
    draws: Sequence[tuple[Tensor, Tensor, Tensor]], length: int, parameters: Sequence[Tensor]
) -> np.ndarray:
    """Squared length of the gradient that each token of a response makes. # float64 [L]"""
    lengths = np.zeros(length)
    for token in range(length):
        masking = [weights[0, token] * logps[0, token] for logps, hidden, weights in draws if hidden[0, token]]
        if masking:
            gradients = torch.autograd.grad(sum(masking), parameters, retain_graph=True, allow_unused=True)
            squares = [part.double().square().sum() for part in gradients if part is not None]
            lengths[token] = float(torch.stack(squares).sum())
    return lengths
