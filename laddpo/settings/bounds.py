"""Bounds of a number, for the tables of laddpo/settings/ranges.py."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, both allowed (`above`: the lower one is not), and what is usual."""

    usual: str
    low: float | None = None
    high: float | None = None
    above: bool = False


def at_least(low: float, usual: str, high: float | None = None) -> Range:
    return Range(usual, low, high)


def more_than(low: float, usual: str, high: float | None = None) -> Range:
    return Range(usual, low, high, above=True)
