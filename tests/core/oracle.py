"""The likelihood bound without estimation: B as a finite sum, and the exact mean of an estimator's production code.

`exact_bound` scores every mask of a response by a plain forward of the model and sums with the definition's weights; it
shares no code with the estimators. `exact_mean` runs the estimator itself on every outcome of its random words, each
with its probability, and scores what comes out through the production packing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from laddpo.core.draws import BERNOULLI_FLOOR, ElboEstimator, MaskedDraw, MaskedSequence
from laddpo.core.elbo import draw_logps
from laddpo.core.noise import FULL, NoiseKey
from laddpo.models.denoiser import TransformerDenoiser
from tests.core.helpers import MASK_ID


def log_sum(denoiser: TransformerDenoiser, prompt: np.ndarray, response: np.ndarray, masked: tuple[int, ...]) -> Tensor:
    """sum over masked i of log p(y_i | x, y with the mask), from the logits of one plain forward. # scalar"""
    seen = [MASK_ID if i in masked else int(token) for i, token in enumerate(response)]
    logits = denoiser.model(input_ids=torch.tensor([[*prompt.tolist(), *seen]])).logits[0]
    logps = logits.log_softmax(-1)
    return sum(logps[len(prompt) + i, int(response[i])] for i in masked)


def nonempty_masks(length: int) -> list[tuple[int, ...]]:
    """All 2^L - 1 of them."""
    return [mask for size in range(1, length + 1) for mask in itertools.combinations(range(length), size)]


def exact_bound(denoiser: TransformerDenoiser, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """B = sum over l of 1/L, over the C(L, l) masks of l tokens, of (L / l) log_sum (LLaDA eq. 6). # scalar"""
    length = len(response)
    return sum(
        log_sum(denoiser, prompt, response, mask) / (length * math.comb(length, len(mask))) * (length / len(mask))
        for mask in nonempty_masks(length)
    )


def exact_mean(
    denoiser: TransformerDenoiser, prompt: np.ndarray, response: np.ndarray, outcomes: list[tuple[float, MaskedDraw]]
) -> Tensor:
    """Mean of the production score over outcomes (probability, draw). # scalar, differentiable"""
    sequences = [MaskedSequence(prompt, response, draw) for _, draw in outcomes]
    probabilities = torch.tensor([probability for probability, _ in outcomes], dtype=torch.float64)
    return (probabilities * draw_logps(denoiser, sequences)).sum()


class ScriptedWords:
    """Takes the place of `NoiseKey.words`, so that a test chooses every random word of a draw."""

    def __init__(self, monkeypatch):
        self.count_word, self.coin, self.cells, self.order = 0, 0, (0,), (0,)
        self.bernoulli: np.ndarray | None = None
        monkeypatch.setattr(NoiseKey, "words", lambda key, purpose, count: self._words(purpose, count))

    def _words(self, purpose: str, count: int) -> np.ndarray:
        if purpose == "mask":
            words = np.argsort(self.order)  # sorting by these words gives back the order
        elif purpose == "count-coin":
            words = [self.coin]
        elif purpose == "bernoulli":
            words = self.bernoulli
        elif "cells" in purpose:
            words = np.argsort(self.cells)
        else:
            assert purpose.startswith("count"), f"a random word that no enumeration knows: {purpose}"
            words = [self.count_word]
        words = np.asarray(words, dtype=np.uint64)
        assert len(words) == count, (purpose, count)
        return words


def count_outcomes(
    script: ScriptedWords, estimator: ElboEstimator, length: int, index: int
) -> list[tuple[float, MaskedDraw]]:
    """Every draw of an estimator of whole counts, with its probability (exact until it is rounded to a float).

    All coins, all shufflings of a grid's cells, all 2^64 count words (as runs of equal counts) and all L! orders.
    """
    cells = max(1, estimator.diffusion_samples // estimator.block)
    shuffles = list(itertools.permutations(range(cells)))
    orders = list(itertools.permutations(range(length)))
    found: dict[tuple, tuple[Fraction, MaskedDraw]] = {}
    for script.coin, script.cells in itertools.product((0, 1), shuffles):
        script.order = orders[0]  # how many tokens are masked does not depend on the order
        for word, words in _runs(lambda word: _size(script, estimator, length, index, word)).values():
            script.count_word = word
            for script.order in orders:
                draw = estimator.draw("pair", "chosen", length, index)
                key = (tuple(draw.masked), draw.weight)
                share = Fraction(words, FULL * len(orders) * len(shuffles) * 2)
                found[key] = (found[key][0] + share if key in found else share, draw)
    assert sum(share for share, _ in found.values()) == 1
    return [(float(share), draw) for share, draw in found.values()]


def _size(script: ScriptedWords, estimator: ElboEstimator, length: int, index: int, word: int) -> int:
    script.count_word = word
    return len(estimator.draw("pair", "chosen", length, index).masked)


def _runs(size_of: Callable[[int], int]) -> dict[int, tuple[int, int]]:
    """{size: (a word that gives it, how many words do)}, together all FULL words.

    Sizes are monotone in the word but for the wrap-around of a shift, which the eighths of the range separate: the
    first eight points of the low-discrepancy sequence are eighths.
    """
    found: dict[int, tuple[int, int]] = {}
    todo = [(eighth * FULL // 8, (eighth + 1) * FULL // 8) for eighth in range(8)]
    while todo:
        low, high = todo.pop()
        size = size_of(low)
        if size == size_of(high - 1):
            found[size] = (low, found.get(size, (low, 0))[1] + high - low)
        else:
            todo += [(low, (low + high) // 2), ((low + high) // 2, high)]
    return found


def bernoulli_outcomes(
    script: ScriptedWords, estimator: ElboEstimator, length: int, nodes: int = 12
) -> list[tuple[float, MaskedDraw]]:
    """Every mask at the Gauss-Legendre nodes of the masking probability; exact for its polynomials of degree < 2 nodes.

    With p = masking probability, a mask of k tokens has probability p^k (1-p)^(L-k).
    """
    points, point_weights = np.polynomial.legendre.leggauss(nodes)
    outcomes = []
    for point, point_weight in zip((points + 1) / 2, point_weights / 2, strict=True):
        script.count_word = int(point * FULL)
        p = (1 - BERNOULLI_FLOOR) * point + BERNOULLI_FLOOR
        for mask in nonempty_masks(length):
            script.bernoulli = np.array([0 if i in mask else FULL - 1 for i in range(length)], dtype=np.uint64)
            draw = estimator.draw("pair", "chosen", length, 0)
            assert tuple(draw.masked) == mask
            outcomes.append((point_weight * p ** len(mask) * (1 - p) ** (length - len(mask)), draw))
    return outcomes


def exact_bernoulli_mean(denoiser: TransformerDenoiser, prompt: np.ndarray, response: np.ndarray) -> float:
    """Mean over p ~ U(floor, 1) of (1/p) log_sum, each mask's polynomial in p integrated in closed form."""
    length, total = len(response), 0.0
    for mask in nonempty_masks(length):
        k = len(mask)
        # p^(k-1) (1-p)^(L-k)
        integrand = np.polynomial.Polynomial([0] * (k - 1) + [1]) * np.polynomial.Polynomial([1, -1]) ** (length - k)
        primitive = integrand.integ()
        share = (primitive(1) - primitive(BERNOULLI_FLOOR)) / (1 - BERNOULLI_FLOOR)
        total += share * log_sum(denoiser, prompt, response, mask).item()
    return total
