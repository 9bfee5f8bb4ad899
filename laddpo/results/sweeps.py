"""A sweep as a table: jobs with overrides and a metric go in, one cell per combination comes out.

Only finished jobs that have the metric are ranked; the others are listed below with their state. Repetitions over seeds
are pooled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laddpo.results.stats import mean_with_error

POOLED_KEYS = ("seed",)  # jobs that differ in these alone are repetitions of one cell

Value = float | str


@dataclass(frozen=True)
class SweepJob:
    """One job: the overrides it ran with, its metric (None: it is not ranked), the metric's interval if known, its
    state in words, and what else it measured."""

    overrides: Mapping[str, Any]
    value: float | None
    interval: tuple[float, float] | None = None
    folder: str = ""
    state: str = ""
    measured: str = ""

    @property
    def is_ranked(self) -> bool:
        return self.value is not None and math.isfinite(self.value)


@dataclass(frozen=True)
class SweepCell:
    """The jobs of one combination of swept values. Pooled over seeds, `interval` is mean ± 2 standard errors, and None
    where the runs are equal to the last digit: they do not tell how much runs vary."""

    values: tuple[Value, ...]
    mean: float | None
    interval: tuple[float, float] | None
    jobs: tuple[SweepJob, ...]

    @property
    def spread_text(self) -> str:
        """ "±0.012, 3 runs" for a pooled cell, else nothing."""
        runs = [job.value for job in self.jobs if job.is_ranked]
        if len(runs) < 2:
            return ""
        if len(set(runs)) == 1:
            return f"{len(runs)} equal runs"
        return f"±{mean_with_error(runs).std_error:.2g}, {len(runs)} runs"

    @property
    def detail(self) -> str:
        """What stands below its mean: how far runs spread, or one run's own interval."""
        if self.mean is None or self.interval is None or self.spread_text:
            return self.spread_text
        return "[{}, {}]".format(*map(number_text, self.interval))

    @property
    def state_text(self) -> str:
        """How its jobs ended, where none of them is ranked: "failed (exit code 1)", "not started"."""
        return ", ".join(dict.fromkeys(job.state or "no value" for job in self.jobs)) if self.mean is None else ""

    def label(self, keys: Sequence[str]) -> str:
        """ "beta=0.5, loss=ipo": what tells this cell from the others."""
        pairs = zip(keys, self.values, strict=True)
        return ", ".join(f"{key.rsplit('.', 1)[-1]}={number_text(value)}" for key, value in pairs) or "default"


@dataclass(frozen=True)
class SweepTable:
    """`keys` are the overrides that vary between jobs, in command-line order; `cells` follow their values."""

    metric: str
    keys: tuple[str, ...]
    cells: tuple[SweepCell, ...]
    is_higher_better: bool = True

    @property
    def best(self) -> SweepCell | None:
        ranked = self.sorted_cells()
        return ranked[0] if ranked and ranked[0].mean is not None else None

    @property
    def winners(self) -> tuple[SweepCell, ...]:
        """The best cell and those that equal it to the last digit, in the order of the table."""
        best = self.best
        return tuple(cell for cell in self.cells if best is not None and cell.mean == best.mean)

    def share(self, cell: SweepCell) -> float:
        """How good a ranked cell is: from 0 (the worst) to 1 (the best); 1/2 where all are equal."""
        known = [other.mean for other in self.cells if other.mean is not None]
        if max(known) == min(known):
            return 0.5
        share = (cell.mean - min(known)) / (max(known) - min(known))
        return share if self.is_higher_better else 1 - share

    @property
    def unranked(self) -> list[SweepJob]:
        """The jobs that are not ranked."""
        return [job for cell in self.cells for job in cell.jobs if not job.is_ranked]

    @property
    def unranked_text(self) -> str:
        """ "not ranked: 1 failed (exit code 1), 2 not started", or nothing."""
        counts = Counter(job.state or "no value" for job in self.unranked)
        return "not ranked: " + ", ".join(f"{n} {state}" for state, n in counts.items()) if counts else ""

    @property
    def tie_text(self) -> str:
        """ "2 settings tie at 0.7: beta=1; beta=2" where more than one is best, else nothing."""
        if len(self.winners) < 2:
            return ""
        names = "; ".join(cell.label(self.keys) for cell in self.winners)
        return f"{len(self.winners)} settings tie at {number_text(self.winners[0].mean)}: {names}"

    def values_of(self, key: str) -> list[Value]:
        """The values of a key, ascending, without repetition."""
        column = self.keys.index(key)
        return sorted({cell.values[column] for cell in self.cells}, key=_order)

    def sorted_cells(self) -> list[SweepCell]:
        """Best first; cells without a value last."""
        sign = -1 if self.is_higher_better else 1
        return sorted(self.cells, key=lambda cell: (cell.mean is None, sign * (cell.mean or 0.0)))


def sweep_table(jobs: Sequence[SweepJob], metric: str, is_higher_better: bool = True) -> SweepTable:
    """Group jobs by the overrides that vary; repetitions over seeds are pooled into one cell.

    An override that some jobs lack reads "default" there.
    """
    names = list(dict.fromkeys(name for job in jobs for name in job.overrides))
    keys = tuple(
        name
        for name in names
        if name not in POOLED_KEYS and len({_value(job.overrides.get(name, "default")) for job in jobs}) > 1
    )
    by_values: dict[tuple[Value, ...], list[SweepJob]] = {}
    for job in jobs:
        by_values.setdefault(tuple(_value(job.overrides.get(key, "default")) for key in keys), []).append(job)
    ordered = sorted(by_values, key=lambda values: [_order(value) for value in values])
    return SweepTable(metric, keys, tuple(_cell(values, by_values[values]) for values in ordered), is_higher_better)


def number_text(value: Value) -> str:
    """Three significant digits, without an exponent where that is short: 0.125, 12.3, 5e-07, 1500."""
    if not isinstance(value, float):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}"


def _cell(values: tuple[Value, ...], jobs: list[SweepJob]) -> SweepCell:
    known = [job.value for job in jobs if job.is_ranked]
    if not known:
        return SweepCell(values, None, None, tuple(jobs))
    if len(known) == 1:
        interval = next(job.interval for job in jobs if job.is_ranked)
        return SweepCell(values, known[0], interval, tuple(jobs))
    mean = mean_with_error(known)
    reach = 2 * mean.std_error
    interval = (mean.mean - reach, mean.mean + reach) if len(set(known)) > 1 else None
    return SweepCell(values, mean.mean, interval, tuple(jobs))


def _value(value: Any) -> Value:
    """A number where the override is one, else its text."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _order(value: Value) -> tuple[bool, float, str]:
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")
