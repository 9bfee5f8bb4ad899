"""A sweep as one picture: a heat map over two settings, a line over one number, else a row for each job."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laddpo.results.figures import ACCENT, DARK, PALE, drawn, new_figure, save_png, say_nothing, tidy
from laddpo.results.sweeps import SweepCell, SweepTable, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_WIDTH = 36  # letters


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
