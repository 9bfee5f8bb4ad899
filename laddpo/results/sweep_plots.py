"""A sweep as one picture: a heat map over two settings, a line over one number, else a row for each job."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.results.figures import DARK, PALE, cell_colors, drawn, new_figure, save_png, say_nothing, tidy
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
        figure = new_figure(7.0 if len(keys) > 1 else 5.2, max(2.6, 0.2 * lines + 0.2 * len(table.cells) + 1.5), title)
        _draw_dots(figure.subplots(), table)
    save_png(figure, path)


def _draw_heat_map(figure: Figure, table: SweepTable) -> None:
    """First swept key down, second across; brighter is better; a cell without a finished job says how its
    jobs ended."""
    from matplotlib.patches import Rectangle

    rows, columns = (table.values_of(key) for key in table.keys)
    axes = figure.subplots()
    for cell in table.cells:
        column, row = columns.index(cell.values[1]), rows.index(cell.values[0])
        is_best = cell in table.winners
        words, (face, ink) = textwrap.fill(cell.state_text, 14), ("#f3f3f3", "#000000")
        if cell.mean is not None:
            words, (face, ink) = number_text(cell.mean), cell_colors(table.share(cell))
            words = "\n".join(filter(None, (f"★ {words}" if is_best else words, cell.detail)))
        frame = {"edgecolor": "black", "linewidth": 2.5, "zorder": 2} if is_best else {"edgecolor": "white"}
        axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, facecolor=face, **frame))
        look = {"ha": "center", "va": "center", "fontsize": 9, "weight": "bold" if is_best else "normal"}
        axes.text(column, row, words, color=ink, zorder=3, **look)
    axes.set_xticks(range(len(columns)), [number_text(value) for value in columns], fontsize=9)
    axes.set_yticks(range(len(rows)), [number_text(value) for value in rows], fontsize=9)
    axes.set_xlim(-0.52, len(columns) - 0.48)
    axes.set_ylim(len(rows) - 0.48, -0.52)
    axes.tick_params(length=0)
    axes.set_ylabel(table.keys[0], fontsize=9)
    axes.set_xlabel(table.keys[1], fontsize=9)
    marked = f"★ best, {len(table.winners)} tie" if len(table.winners) > 1 else "★ best"
    axes.set_title(f"{table.metric} ({marked})" if table.winners else table.metric, fontsize=10, loc="left")
    for side in axes.spines.values():
        side.set_visible(False)


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
        text = _marked(table, cell)
        axes.annotate(text, (value, top), (0, 5), textcoords="offset points", ha="center", fontsize=8.5, weight=weight)
    if x and min(x) > 0 and max(x) / min(x) >= 8:
        axes.set_xscale("log")
    axes.set_xticks(x, [number_text(value) for value in x])
    axes.minorticks_off()
    axes.set_xlabel(table.keys[0], fontsize=9)
    axes.margins(x=0.12, y=0.15)


def _marked(table: SweepTable, cell: SweepCell) -> str:
    return f"★ {number_text(cell.mean)}" if cell in table.winners else number_text(cell.mean)


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
            _marked(table, cell), (cell.mean, row), (0, 6), textcoords="offset points", fontsize=8, ha="center"
        )
    axes.set_yticks(range(len(cells)), [_label_lines(table, cell) for cell in cells], fontsize=8.5)
    axes.set_ylim(len(cells) - 0.4, -0.75)
    axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.7)
    axes.margins(x=0.1)
