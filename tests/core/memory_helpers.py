"""Masked sequences of given lengths, for tests that count bytes."""

from __future__ import annotations

import numpy as np

from laddpo.core.draws import MaskedDraw, MaskedSequence


def masked_sequences(lengths: list[int], vocabulary: int, masked_share: float = 0.5) -> list[MaskedSequence]:
    """One response after another, each behind a prompt of one token, whose first tokens are masked."""
    rng = np.random.default_rng(0)
    sequences = []
    for length in lengths:
        masked = np.arange(max(1, int(masked_share * (length - 1))))
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        sequences.append(MaskedSequence(ids[:1], ids[1:], MaskedDraw(0, masked, 2.0)))
    return sequences
