"""Which rows are used, and which of them are held out: by content and seed, never by position in a file."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import numpy as np

from laddpo.preference.prepared import SPLITS
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.spool import Spool, keyed_position


def choose_rows(
    spool: Spool, weights: Sequence[float], seed: int, random_sample_size: int | None, log: ReadLog
) -> np.ndarray:
    """Indices of the rows to use, in content order.

    One source gives all its rows or `random_sample_size` of them. Several give rows in proportion to their weights, as
    many as the scarcest allows (or `random_sample_size` in all): no row is ever used twice to fill a share. Rows of
    parts without a weight, which are test rows, are left alone.
    """
    counts = np.bincount(spool.parts, minlength=len(weights))[: len(weights)].tolist()
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


def choose_splits(
    spool: Spool, rows: np.ndarray, seed: int, validation_fraction: float, test_fraction: float, log: ReadLog
) -> np.ndarray:
    """int8 [rows]: index into SPLITS of each row. All rows of a prompt go the same way.

    A prompt has a keyed position. Below `validation_fraction` it is held out for validation, and in the last
    `test_fraction` for the test, so a prompt keeps its side when rows are added. Each share above 0 gets at least one
    prompt, the one nearest to its edge, as long as one is left to train on. Of unpaired rows each of them gets both
    labels in the same way.
    """
    groups, member = np.unique(spool.groups[rows], return_inverse=True)
    positions = np.array([keyed_position(seed, f"group/{int(group):016x}") for group in groups], dtype=np.uint64)
    split = np.zeros(len(groups), dtype=np.int8)
    is_held_out = positions < edge_of(validation_fraction)
    if validation_fraction > 0 and len(groups) > 1 and is_held_out.all() | ~is_held_out.any():
        edge = int(np.argmax(positions) if is_held_out.all() else np.argmin(positions))
        is_held_out[edge] = not is_held_out[edge]
    if validation_fraction > 0 and len(groups) == 1:
        is_held_out[:] = False
        log.warn("rows that all have the same prompt, so that none is held out for validation", len(rows))
    split[is_held_out] = SPLITS.index("validation")

    rest = np.flatnonzero(~is_held_out)
    rest = rest[np.argsort(positions[rest], kind="stable")]
    if test_fraction > 0 and len(rest) > 1:
        wanted = int((positions[rest] >= edge_of(1 - test_fraction)).sum())
        split[rest[len(rest) - min(max(wanted, 1), len(rest) - 1) :]] = SPLITS.index("test")
    _share_labels(split, member, spool.labels[rows], np.argsort(positions, kind="stable"), log)
    return split[member]


def _share_labels(
    split: np.ndarray, member: np.ndarray, labels: np.ndarray, by_position: np.ndarray, log: ReadLog
) -> None:
    """Move prompts of unpaired rows so that each split has rows of both labels, if there are prompts enough: training
    first, then validation, then the test. What cannot be had is noted.

    `split` by prompt; `member` (each row's prompt) and `labels` by row.
    """
    has = [np.bincount(member, labels == label, minlength=len(split)) > 0 for label in (0, 1)]  # bool [prompts]
    there = [label for label in (0, 1) if has[label].any()]

    def may_leave(prompt: int, target: int) -> bool:
        rest = split == split[prompt]
        rest[prompt] = False
        return split[prompt] > target or all(has[label][rest].any() for label in there)

    for target, label in product([index for index in range(len(SPLITS)) if (split == index).any()], there):
        if has[label][split == target].any():
            continue
        order = by_position if SPLITS[target] == "validation" else by_position[::-1]
        movable = (prompt for prompt in order if has[label][prompt] and may_leave(prompt, target))
        if (prompt := next(movable, None)) is not None:
            split[prompt] = target
        else:
            word = ("undesirable", "desirable")[label]
            note = f"{word} completions, of so few prompts that none is held out for {SPLITS[target]}"
            log.warn(note, int((labels == label).sum()))


def edge_of(share: float) -> np.uint64:
    """The position below which a share of all prompts lies."""
    return np.uint64(min(int(share * 2**64), 2**64 - 1))
