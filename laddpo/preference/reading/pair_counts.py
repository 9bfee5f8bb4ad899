"""What was made of rows with scores, ranks, weights or margins: counts and quantiles for the report."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
MEANINGS = {
    "lists": "rows with a list of answers",
    "answers": "answers in these lists",
    "pairs": "pairs made of rows with scores, ranks or lists of answers",
    "ties": "times two answers had equal scores: no pair was made of them",
    "equal": "pairs whose two answers have equal scores, kept as they are",
    "below_gap": "pairs left out: their scores differ by less than data.min_gap",
    "same_text": "times two answers of a row were the same text: no pair was made of them",
    "without_scores": "pairs without scores among rows that have them",
}


@dataclass
class PairCounts:
    """Collected while rows are read. Gaps are differences of scores or ranks, one for each pair that has scores.
    `rules` are those by which the pairs were made."""

    counts: Counter[str] = field(default_factory=Counter)
    rules: set[Any] = field(default_factory=set)
    values: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in VALUES})

    def add(self, gap: float | None, weight: float, margin: float) -> None:
        """One pair that was made."""
        if gap is not None:
            self.values["gap"].append(gap)
        self.values["weight"].append(weight)
        self.values["margin"].append(margin)

    def left_out(self) -> list[str]:
        """Why answers made no pair, a line for each reason."""
        reasons = ("ties", "below_gap", "same_text")
        return [f"{self.counts[name]:,} {MEANINGS[name]}" for name in reasons if self.counts[name]]

    def facts(self) -> dict[str, Any]:
        """For report.json: nothing if all rows were plain pairs."""
        plain = {"gap": None, "weight": 1.0, "margin": 0.0}
        told = {name: _quantiles(kept) for name, kept in self.values.items() if any(v != plain[name] for v in kept)}
        counts = {name: self.counts[name] for name in MEANINGS if self.counts[name]}
        return {"ranked": {"counts": counts, **told}} if counts or told else {}


def ranked_lines(ranked: Mapping[str, Any]) -> list[str]:
    """The facts as lines of the report."""
    lines = [f"  ranked   {count:>8,}  {MEANINGS[name]}" for name, count in ranked["counts"].items()]
    for name, meaning in VALUES.items():
        if name in ranked:
            shown = ", ".join(f"{quantile} {value:g}" for quantile, value in ranked[name].items())
            lines.append(f"  ranked   {meaning}: {shown}")
    return lines


def _quantiles(values: array) -> dict[str, float]:
    found = np.quantile(np.frombuffer(values), list(QUANTILES.values()), method="inverted_cdf")
    return {name: round(float(value), 6) for name, value in zip(QUANTILES, found, strict=True)}


VALUES = {
    "gap": "gaps between the scores of a pair",
    "weight": "weights in the loss",
    "margin": "margins in the loss",
}
