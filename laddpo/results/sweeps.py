"""A sweep as a table and a picture: jobs with overrides and a metric go in, one cell per combination comes out.

Only finished jobs that have the metric are ranked; the others are listed below with their state. Repetitions over seeds
are pooled. Two swept keys give a heat map with numbers, one numeric key a line with intervals.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laddpo.results.figures import ACCENT, DARK, PALE, drawn, new_figure, save_png, say_nothing, tidy
from laddpo.results.stats import mean_with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_WIDTH = 36  # letters
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


@drawn
def sweep_plot(table: SweepTable, path: Path, *, title: str = "") -> None:
    """One PNG of a sweep: a line with intervals over one numeric key, a heat map with numbers over two keys, else a
    row of dots per job."""
    keys = table.keys
    if len(keys) == 2 and len(table.cells) > 1:
        columns, rows = len(table.values_of(keys[1])), len(table.values_of(keys[0]))
        figure = new_figure(max(4.5, 1.3 * columns + 2.4), max(3.2, 0.75 * rows + 1.9), title)
        _draw_heat_map(figure, table)
    elif len(keys) == 1 and all(isinstance(value, float) for value in table.values_of(keys[0])):
        figure = new_figure(5.6, 3.9, title)
        _draw_line(figure.subplots(), table)
    else:
        lines = sum(_label_lines(table, cell).count("\n") + 1 for cell in table.cells)
        figure = new_figure(7.0, max(2.6, 0.2 * lines + 0.2 * len(table.cells) + 1.5), title)
        _draw_dots(figure.subplots(), table)
    save_png(figure, path)


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


def _draw_heat_map(figure: Figure, table: SweepTable) -> None:
    """First swept key down, second across; darker is larger; a cell without a finished job says how its jobs ended."""
    row_key, column_key = table.keys
    rows, columns = table.values_of(row_key), table.values_of(column_key)
    means = np.full((len(rows), len(columns)), np.nan)
    for cell in table.cells:
        if cell.mean is not None:
            means[rows.index(cell.values[0]), columns.index(cell.values[1])] = cell.mean
    axes = figure.subplots()
    axes.set_facecolor("#f3f3f3")
    image = axes.imshow(np.ma.masked_invalid(means), cmap="Greys", aspect="auto", **_grey_range(means))
    for cell in table.cells:
        row, column = rows.index(cell.values[0]), columns.index(cell.values[1])
        text = textwrap.fill(cell.state_text, 14) if cell.mean is None else number_text(cell.mean)
        if cell.spread_text:
            text += f"\n{cell.spread_text}"
        is_dark = cell.mean is not None and image.norm(cell.mean) > 0.55
        weight = "bold" if cell in table.winners else "normal"
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=9,
            color="white" if is_dark else "black",
            weight=weight,
        )
    for winner in table.winners:
        from matplotlib.patches import Rectangle

        row, column = rows.index(winner.values[0]), columns.index(winner.values[1])
        axes.add_patch(Rectangle((column - 0.49, row - 0.49), 0.98, 0.98, fill=False, edgecolor=ACCENT, linewidth=2.5))
    axes.set_xticks(range(len(columns)), [str(number_text(value)) for value in columns], fontsize=9)
    axes.set_yticks(range(len(rows)), [str(number_text(value)) for value in rows], fontsize=9)
    axes.set_xlabel(column_key, fontsize=9)
    axes.set_ylabel(row_key, fontsize=9)
    framed = f"framed: best, {len(table.winners)} tie" if len(table.winners) > 1 else "framed: best"
    axes.set_title(f"{table.metric} ({framed})" if table.winners else table.metric, fontsize=10, loc="left")
    for side in axes.spines.values():
        side.set_visible(False)


def _grey_range(means: np.ndarray) -> dict[str, float]:
    """Limits that leave the palest cell light grey rather than white, and equal cells mid-grey."""
    known = means[np.isfinite(means)]
    if not len(known) or known.min() == known.max():
        centre = float(known[0]) if len(known) else 0.0
        return {"vmin": centre - 1, "vmax": centre + 2}
    span = float(known.max() - known.min())
    return {"vmin": float(known.min()) - 0.25 * span, "vmax": float(known.max()) + 0.25 * span}


def _draw_line(axes: Axes, table: SweepTable) -> None:
    """The metric over one numeric key; a wide range of positive values has a log axis."""
    cells = [cell for cell in table.cells if cell.mean is not None]
    tidy(axes, _title(table))
    x = [cell.values[0] for cell in cells]
    for value, cell in zip(x, cells, strict=True):
        if cell.interval is not None:
            axes.vlines(value, *cell.interval, color=PALE, linewidth=6)
    axes.plot(x, [cell.mean for cell in cells], color=DARK, marker="o", linewidth=1.4)
    for value, cell in zip(x, cells, strict=True):
        weight = "bold" if cell in table.winners else "normal"
        top = cell.mean if cell.interval is None else cell.interval[1]
        text = number_text(cell.mean)
        axes.annotate(text, (value, top), (0, 5), textcoords="offset points", ha="center", fontsize=8.5, weight=weight)
    if x and min(x) > 0 and max(x) / min(x) >= 8:
        axes.set_xscale("log")
    axes.set_xticks(x, [number_text(value) for value in x])
    axes.minorticks_off()
    axes.set_xlabel(table.keys[0], fontsize=9)
    axes.margins(x=0.12, y=0.15)


def _title(table: SweepTable) -> str:
    """The metric, and which jobs are not in the picture."""
    return f"{table.metric}\n{textwrap.fill(table.unranked_text, 60)}" if table.unranked else table.metric


def _label_lines(table: SweepTable, cell: SweepCell) -> str:
    """A cell's label on as many lines as leave the picture its half."""
    return textwrap.fill(cell.label(table.keys), LABEL_WIDTH, break_on_hyphens=False)


def _draw_dots(axes: Axes, table: SweepTable) -> None:
    """One row per cell, best first."""
    cells = [cell for cell in table.sorted_cells() if cell.mean is not None]
    if not cells:
        say_nothing(axes, f"no finished job has {table.metric}")
        return
    tidy(axes, _title(table))
    for row, cell in enumerate(cells):
        if cell.interval is not None:
            axes.hlines(row, *cell.interval, color=PALE, linewidth=6)
        axes.plot(cell.mean, row, "o", color=DARK)
        axes.annotate(
            number_text(cell.mean), (cell.mean, row), (0, 6), textcoords="offset points", fontsize=8, ha="center"
        )
    axes.set_yticks(range(len(cells)), [_label_lines(table, cell) for cell in cells], fontsize=8.5)
    axes.set_ylim(len(cells) - 0.4, -0.75)
    axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.7)
    axes.margins(x=0.1)
