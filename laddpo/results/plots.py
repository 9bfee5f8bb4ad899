"""Pictures of what happened: a training run, base against tuned. Numbers go in, one PNG file comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laddpo.results.figures import (
    ACCENT,
    DARK,
    PAGE_DPI,
    PALE,
    RULE,
    drawn,
    new_figure,
    only_a_picture,
    save_png,
    say_nothing,
    tidy,
)
from laddpo.results.panels import DETAIL_PANELS, PANELS, Curve, Panel
from laddpo.results.stats import wilson_interval
from laddpo.results.tables import is_share, is_tied

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALIDATION = "validation/"  # prefix of a metric of the validation pairs
ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"
SMOOTH_FROM = 60  # logged steps above which a curve gets its moving average


@drawn
def training_plot(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    timing: Sequence[Mapping[str, Any]] = (),
    title: str = "",
    best_step: int | None = None,
) -> None:
    """One PNG of a training run from the rows of metrics.jsonl (and timing.jsonl).

    A row is a flat object with `step` and metrics; a metric of the validation pairs has the prefix `validation/`.
    Panels without data are left out; with `timing` there is a further row of them. `best_step` marks the checkpoint
    that was kept.
    """
    series = _series([*rows, *timing])
    wanted = (*PANELS, *DETAIL_PANELS) if timing else PANELS
    panels = [panel for panel in wanted if any(curve.metric in series for curve in _with_validation(panel))]
    columns = min(len(panels), 4 if len(panels) > 6 else 3) or 1
    lines = math.ceil(len(panels) / columns) or 1
    figure = new_figure(4.2 * columns, 3.1 * lines, title)
    if not panels:
        say_nothing(figure.subplots(), "no metrics logged yet")
    for number, panel in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(lines, columns, number), panel, series, best_step)
    save_png(figure, path)


def panel_plots(
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    timing: Sequence[Mapping[str, Any]] = (),
    best_step: int | None = None,
) -> list[tuple[Panel, Path]]:
    """The same panels as files of their own, for pages that arrange them. Curves that never change are left out."""
    series = _series([*rows, *timing])
    made = []
    for panel in (*PANELS, *DETAIL_PANELS):
        if any(_changes(series[curve.metric][1]) for curve in _logged(panel, series)):
            name = "".join(letter if letter.isalnum() else "_" for letter in panel.title.lower())
            with only_a_picture(path := folder / f"{name}.png"):
                figure = new_figure(4.6, 2.9, "")
                _draw_panel(figure.subplots(), panel, series, best_step)
                save_png(figure, path, PAGE_DPI)
                made.append((panel, path))
    return made


def constant_curves(
    rows: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]] = ()
) -> list[tuple[Panel, str]]:
    """The panels that `panel_plots` leaves out, with their value: a number for each curve."""
    series = _series([*rows, *timing])
    found = []
    for panel in (*PANELS, *DETAIL_PANELS):
        curves = _logged(panel, series)
        if curves and not any(_changes(series[curve.metric][1]) for curve in curves):
            values = [(curve.label, f"{series[curve.metric][1][-1]:.4g}") for curve in curves]
            found.append(
                (panel, ", ".join(f"{label} {value}" if len(curves) > 1 else value for label, value in values))
            )
    return found


def _logged(panel: Panel, series: Mapping) -> list[Curve]:
    return [curve for curve in _with_validation(panel) if curve.metric in series]


def _changes(values: np.ndarray) -> bool:
    return bool(np.ptp(values) > 1e-9 * np.abs(values).max())


@drawn
def margins_plot(tuned: Sequence[float], path: Path) -> None:
    """The distribution of the tuned model's reward margins alone."""
    figure = new_figure(4.6, 2.9, "")
    _draw_margins(figure.subplots(), None, np.asarray(tuned, dtype=float))
    save_png(figure, path, PAGE_DPI)


@drawn
def evaluation_plot(
    results: Mapping[str, Any],
    path: Path,
    *,
    base_margins: Sequence[float] | None = None,
    tuned_margins: Sequence[float] | None = None,
    title: str = "",
) -> None:
    """Base against tuned with 95% intervals for every metric of results.json, and the distribution of the margins.

    An entry has base, tuned, difference, interval and items (what `stats.compare` gives); where it brings no interval
    of its own for base or tuned, a proportion gets Wilson's. Other numbers than shares are left to the table. Margins
    are drawn where given; base margins that are all 0 (the base is its own reference) are a line of text, not drawn.
    The base's accuracy is not drawn either if it is ties alone. One pair has no distribution.
    """
    entries = {name: entry for name, entry in results.items() if isinstance(entry, Mapping)}
    shown = {name: entry for name, entry in entries.items() if is_share(name, entry)}
    has_margins = tuned_margins is not None and len(tuned_margins) > 1
    width, height = 5.0, max(2.0, 0.85 * len(shown) + 0.75)
    figure = new_figure(width + (5.0 if has_margins else 0), max(height, 3.4) if has_margins else height, title)
    axes = figure.subplots(1, 2, width_ratios=[width, 5.0]) if has_margins else [figure.subplots()]
    _draw_before_after(axes[0], shown, [name for name in shown if is_tied(name, results)])
    if has_margins:
        _draw_margins(axes[1], base_margins, np.asarray(tuned_margins, dtype=float))
    save_png(figure, path, PAGE_DPI)


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric name -> (steps, values), sorted by step; a step logged twice keeps its last value.

    An accuracy of 0.5 at margin 0 is left out: before the first update the model ties with itself on every pair.
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if (
                name != "step"
                and isinstance(value, (int, float))
                and not isinstance(value, bool)
                and math.isfinite(value)
                and not (name.endswith(ACCURACY) and value == 0.5 and row.get(name.replace(ACCURACY, MARGIN)) == 0)
            ):
                found.setdefault(name, {})[row["step"]] = float(value)
    return {
        name: (np.array(sorted(points)), np.array([points[s] for s in sorted(points)]))
        for name, points in found.items()
    }


def _with_validation(panel: Panel) -> list[Curve]:
    """The panel's curves, each followed by its validation twin."""
    twins = []
    for curve in panel.curves:
        twins.append(curve)
        label = f"{curve.label}, validation" if len(panel.curves) > 1 else "validation"
        color = ACCENT if len(panel.curves) == 1 else curve.color
        twins.append(Curve(VALIDATION + curve.metric, label, color, ":" if len(panel.curves) > 1 else "--", "o"))
    return twins


def _draw_panel(axes: Axes, panel: Panel, series: Mapping, best_step: int | None) -> None:
    tidy(axes, panel.title)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    if panel.level is not None:
        axes.axhline(panel.level, color=RULE, linewidth=0.9, linestyle=(0, (1, 2)))
    for curve in _with_validation(panel):
        if curve.metric in series:
            _draw_curve(axes, curve, *series[curve.metric], is_exact=panel.is_exact)
    if panel.title == "Loss":
        _draw_band(axes, series)
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    if panel.is_log and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    if best_step is not None:
        label = f"kept: step {best_step}" if panel.title == "Loss" else None  # said once is enough
        axes.axvline(best_step, color=RULE, linewidth=0.9, linestyle="-.", label=label)
    if set(axes.get_legend_handles_labels()[1]) - {"training"}:
        axes.legend(fontsize=7.5, frameon=False)
    last_step = max(int(steps[-1]) for steps, _ in series.values())
    axes.set_xlim(-0.03 * max(last_step, 1), 1.03 * max(last_step, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_curve(axes: Axes, curve: Curve, steps: np.ndarray, values: np.ndarray, is_exact: bool) -> None:
    """The curve; a long one pale, under its moving average."""
    look = {"color": curve.color, "linestyle": curve.style, "label": curve.label}
    if curve.marker or is_exact or len(steps) < SMOOTH_FROM:
        marker = curve.marker or ("." if len(steps) == 1 else "")
        axes.plot(steps, values, marker=marker, markersize=3.5, linewidth=1.4, **look)
        return
    window = max(3, len(steps) // 20) | 1  # odd: centred
    axes.plot(steps, values, color=curve.color, alpha=0.25, linewidth=0.7)
    axes.plot(steps, _moving_average(values, window), linewidth=1.6, **look)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) values, fewer at the ends."""
    sums = np.convolve(values, np.ones(window), mode="same")
    return sums / np.convolve(np.ones(len(values)), np.ones(window), mode="same")


def _draw_band(axes: Axes, series: Mapping) -> None:
    """Shade the loss by how much the random masks alone move it.

    `loss/std_error` where it is logged, else the bound that Var(loss) <= variance of the score gives for one pair
    (VRPO, theorem 2).
    """
    if "loss" not in series:
        return
    steps, loss = series["loss"]
    if "loss/std_error" in series:
        (at, half_width), label = series["loss/std_error"], "± standard error"
    elif "score/variance" in series:
        at, variance = series["score/variance"]
        half_width, label = np.sqrt(variance), "± bound from the masks, one pair"
    else:
        return
    common, of_loss, of_band = np.intersect1d(steps, at, return_indices=True)
    loss, half_width = loss[of_loss], half_width[of_band]
    if len(common) >= SMOOTH_FROM:
        window = max(3, len(common) // 20) | 1
        loss, half_width = _moving_average(loss, window), _moving_average(half_width, window)
    axes.fill_between(common, loss - half_width, loss + half_width, color=PALE, alpha=0.45, linewidth=0, label=label)


def _draw_before_after(axes: Axes, entries: Mapping[str, Mapping[str, Any]], tied: Sequence[str]) -> None:
    """Two bars for each entry, one below the other, so that the picture is narrow enough for a phone."""
    if not entries:
        say_nothing(axes, "no share to compare")
        return
    tidy(axes, "Base and tuned, 95% intervals")
    for offset, which, face, hatch in ((1, "base", "white", "///"), (2, "tuned", DARK, "")):
        for row, (name, entry) in enumerate(entries.items()):
            place, value = 3 * row + offset, entry[which]
            if which == "base" and name in tied:
                axes.text(0.01, place, "no preference: margin 0 on every pair", fontsize=8.5, va="center")
                continue
            low, high = _bounds(entry, which)
            errors = [[abs(value - low)], [abs(high - value)]]
            axes.barh(place, value, 0.8, facecolor=face, edgecolor=DARK, hatch=hatch, linewidth=1)
            axes.errorbar(value, place, xerr=errors, ecolor=ACCENT, elinewidth=2, capsize=4, capthick=2)
            axes.text(max(high, value) + 0.015, place, f"{value:.1%}", va="center", fontsize=9)
    for row, (name, entry) in enumerate(entries.items()):
        axes.text(0, 3 * row + 0.25, _entry_label(name, entry, name in tied), fontsize=9, va="center", weight="bold")
    places = [3 * row + offset for row in range(len(entries)) for offset in (1, 2)]
    axes.set_yticks(places, ["base", "tuned"] * len(entries), fontsize=9)
    axes.set_ylim(3 * len(entries) - 0.4, -0.35)
    axes.set_xlim(0, 1.15)  # room for the number beside a bar of 100%
    axes.set_xticks(np.arange(0, 1.01, 0.2), [f"{share:.0%}" for share in np.arange(0, 1.01, 0.2)], fontsize=8.5)
    axes.grid(False)


def _bounds(entry: Mapping[str, Any], which: str) -> tuple[float, float]:
    given = entry.get(f"{which}_interval")
    if given is not None:
        return given[0], given[1]
    return wilson_interval(entry[which] * entry["items"], entry["items"]) if entry.get("items") else (entry[which],) * 2


def _entry_label(name: str, entry: Mapping[str, Any], is_tied: bool) -> str:
    """`exact match: +30.2 points [+25.2, +35.5], 400 items`"""
    parts = []
    if "difference" in entry and "interval" in entry and not is_tied:
        bounds = entry["interval"]
        shown = ", interval unknown" if bounds is None else " [{:+.1f}, {:+.1f}]".format(*(100 * b for b in bounds))
        parts.append(f"{100 * entry['difference']:+.1f} points{shown}")
    if "items" in entry:
        parts.append(f"{entry['items']:,} items")
    return f"{name.replace('_', ' ')}: {', '.join(parts)}" if parts else name.replace("_", " ")


def _draw_margins(axes: Axes, base: Sequence[float] | None, tuned: np.ndarray) -> None:
    tidy(axes, "Reward margin of held-out pairs")
    base_values = np.asarray(base if base is not None else [], dtype=float)
    is_flat = len(base_values) > 0 and not base_values.any()
    everything = tuned if is_flat else np.concatenate([tuned, base_values])
    low, high = np.quantile(everything, [0.005, 0.995])
    reach = max(abs(low), abs(high)) or 1.0
    edges = np.linspace(min(low, -0.1 * reach), max(high, 0.1 * reach), 41)
    inside = np.clip(tuned, edges[0], edges[-1])
    axes.hist(
        inside,
        edges,
        color=PALE,
        edgecolor=DARK,
        linewidth=0.6,
        label=f"tuned: {float((tuned > 0).mean()):.1%} above 0",
    )
    if len(base_values) and not is_flat:
        label = f"base: {float((base_values > 0).mean()):.1%} above 0"
        axes.hist(
            np.clip(base_values, edges[0], edges[-1]), edges, histtype="step", color=ACCENT, linewidth=1.6, label=label
        )
    axes.axvline(0, color=RULE, linestyle="--", linewidth=1.1, label="base: all exactly 0" if is_flat else None)
    axes.axvline(float(tuned.mean()), color="black", linewidth=1.1, label=f"tuned mean {tuned.mean():+.3g}")
    axes.set_xlabel(
        "reward of chosen minus reward of rejected" + (" (tails in the end bars)" if len(tuned) > 200 else ""),
        fontsize=8,
    )
    axes.set_ylabel("pairs", fontsize=8)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)  # room for the legend
    axes.legend(fontsize=8, frameon=False)
