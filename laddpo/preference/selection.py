"""Which rows are used, and which of them are held out: by content and seed, never by position in a file."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from laddpo.preference.reading.files import ReadLog
from laddpo.preference.spool import Spool, keyed_position


def choose_rows(
    spool: Spool, weights: Sequence[float], seed: int, random_sample_size: int | None, log: ReadLog
) -> np.ndarray:
    """Indices of the rows to use, in content order.

    One source gives all its rows or `random_sample_size` of them. Several give rows in proportion to their weights, as
    many as the scarcest allows (or `random_sample_size` in all): no row is ever used twice to fill a share.
    """
    counts = np.bincount(spool.parts, minlength=len(weights)).tolist()
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    total = min(int(count / share) for count, share in zip(counts, shares, strict=True))
    if random_sample_size is not None:
        if random_sample_size > total:
            log.warn(f"data.random_sample_size asks for {random_sample_size:,} rows, only {total:,} could be used")
        total = min(total, random_sample_size)
    quotas = [min(int(share * total + Fraction(1, 2)), count) for share, count in zip(shares, counts, strict=True)]
    chosen = []
    for part, quota in enumerate(quotas):
        rows = np.flatnonzero(spool.parts == part)
        if quota < len(rows):
            rows = rows[np.argsort(spool.keyed_positions(seed, rows), kind="stable")[:quota]]
        chosen.append(rows)
    return np.sort(np.concatenate(chosen))


def choose_validation(spool: Spool, rows: np.ndarray, seed: int, fraction: float, log: ReadLog) -> np.ndarray:
    """bool [rows]: held out for validation. All rows of a prompt go the same way.

    A prompt is held out when its keyed position falls below `fraction`, so a prompt keeps its side when rows are added.
    Where that leaves one side empty, the prompt nearest the edge changes sides. A single prompt is trained on.
    """
    groups, member = np.unique(spool.groups[rows], return_inverse=True)
    positions = np.array([keyed_position(seed, f"group/{int(group):016x}") for group in groups], dtype=np.uint64)
    is_held_out = positions < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    if fraction > 0 and len(groups) > 1 and is_held_out.all() | ~is_held_out.any():
        edge = int(np.argmax(positions) if is_held_out.all() else np.argmin(positions))
        is_held_out[edge] = not is_held_out[edge]
    if fraction > 0 and len(groups) == 1:
        is_held_out[:] = False
        log.warn("rows that all have the same prompt, so that none is held out for validation", len(rows))
    return is_held_out[member]
