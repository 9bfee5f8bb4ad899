"""The variance table as a page, for the terminal and as a picture. Takes the content of variance.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laddpo.estimator_study.noise import BASELINE
from laddpo.estimator_study.techniques import TECHNIQUES
from laddpo.results.figures import ACCENT, DARK, PALE, RULE, drawn, new_figure, save_png, tidy
from laddpo.results.tables import aligned, markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ["setting", "n", "V of score", "x", "V of loss", "V of gradient", "x", "V of B(y_w)", "own V / V"]


def markdown_page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    moved = result["drift"]
    lines = [
        f"# Noise of the masks: {result['model']} on {result['data']}",
        "",
        f"{result['pairs']} training pairs ({result['response_tokens']}), each evaluated {result['evaluations']} times "
        f"with fresh masks, at equal forwards; loss {result['loss']}, beta {result['beta']:g}, run {result['run']}. "
        "Variances are means over pairs of the variance over evaluations, with 95% bootstrap intervals over pairs. "
        f"V of gradient: trace of the covariance of one pair's loss gradient over {result['trainable_parameters']:,} "
        f"trainable parameters, on {result['gradient_pairs']} pairs; a step of B pairs has 1/B of it. "
        f"x: ratio to {BASELINE} at the same n, pair by pair. own V / V: the variance that a pair's own draws "
        "estimate, over the measured one.",
        "",
        f"Training moved B(y_w) {_moved(moved['chosen'])} and B(y_l) {_moved(moved['rejected'])}.",
        "",
        markdown(HEADER, [_cells(row, with_interval=True) for row in result["settings"]]),
        "",
        "![variances](variance.png)",
    ]
    for draws, found in result["techniques"].items():
        lines += ["", f"## Beyond the masks, n = {draws}, relative to the default", "", _technique_table(found)]
    sources = [[name, row.source, row.idea] for name, row in TECHNIQUES.items()]
    lines += ["", "## Where each comes from", "", markdown(["technique", "source", "idea"], sources), ""]
    return "\n".join(lines)


def _moved(side: Mapping[str, float]) -> str:
    """How far one response's ELBO moved, in words."""
    return f"by {side['moved']:+.3f} +- {side['std_error']:.3f} nats from {side['reference']:.2f}"


def terminal_table(result: Mapping[str, Any]) -> str:
    """The settings without intervals."""
    return aligned(HEADER, [_cells(row, with_interval=False) for row in result["settings"]])


def length_words(pairs: Sequence) -> str:
    """How long the responses are, in words."""
    lengths = np.array([len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    if lengths.min() == lengths.max():
        return f"responses of {lengths[0]} tokens"
    return f"responses of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} on average"


@drawn
def variance_plot(result: Mapping[str, Any], path: Path) -> None:
    """Score and gradient variance of every setting at each n, with intervals, as points on a log axis."""
    rows = result["settings"]
    names = list(dict.fromkeys(row["setting"] for row in rows))
    draws = sorted({row["draws"] for row in rows})
    figure = new_figure(12.5, 1.6 + 0.34 * len(names), f"Noise of the masks: {result['model']} on {result['data']}")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, title in (
        (left, "score", "variance of the score"),
        (right, "gradient", "variance of the gradient"),
    ):
        _draw_points(axes, rows, names, draws, column)
        tidy(axes, title)
        axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.7)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    right.legend(fontsize=8, loc="lower right", title="draws per response", title_fontsize=8)
    save_png(figure, path)


def _draw_points(axes: Axes, rows: Sequence[Mapping], names: list[str], draws: list[int], column: str) -> None:
    colors, markers = [PALE, ACCENT, DARK, RULE], ["s", "^", "o", "D"]
    axes.set_xscale("log")
    for k, n in enumerate(draws):
        shown = [row for row in rows if row["draws"] == n and row[column]["value"] > 0]
        values = [row[column]["value"] for row in shown]
        places = [names.index(row["setting"]) + 0.16 * (k - (len(draws) - 1) / 2) for row in shown]
        low, high = (np.array([row[column]["interval"][side] for row in shown]) for side in (0, 1))
        errors = [np.maximum(values - low, 0), np.maximum(high - values, 0)]
        style = {"color": colors[k % 4], "marker": markers[k % 4], "markersize": 4.5, "linewidth": 0, "elinewidth": 1.1}
        axes.errorbar(values, places, xerr=errors, label=f"n = {n}", **style)
        for row, value in zip(shown, values, strict=True):
            if row["setting"] == BASELINE:
                axes.axvline(value, color=colors[k % 4], linewidth=0.8, linestyle=":")


def _cells(row: Mapping[str, Any], with_interval: bool) -> list[str]:
    def value(name: str) -> str:
        text = _number(row[name]["value"])
        return f"{text} [{', '.join(map(_number, row[name]['interval']))}]" if with_interval else text

    def ratio(name: str) -> str:
        if "ratio" not in row[name]:
            return ""
        text, interval = _times(row[name]["ratio"]), row[name]["ratio_interval"]
        return f"{text} [{interval[0]:.2f}, {interval[1]:.2f}]" if with_interval and interval else text

    own = "" if row["own_estimate"] is None else f"{row['own_estimate']:.2f}"
    shown = [value("score"), ratio("score"), _number(row["loss"]["value"]), value("gradient"), ratio("gradient")]
    return [row["setting"], str(row["draws"]), *shown, _number(row["elbo"]["value"]), own]


def _technique_table(found: Mapping[str, Any]) -> str:
    control, adaptive, upper = found["control_variate"], found["adaptive_draws"], found["upper_bound"]
    rows = [
        [
            "control variate",
            f"V of score x {_times(control['score_variance_ratio'])} with c = {control['coefficient']:.2f} and "
            f"{control['stored_draws']} stored draws; bias {_number(control['bias_bound'])} at one standard error",
        ]
    ]
    for name, key in (("spread known", "known"), ("spread from own draws", "own")):
        if adaptive[key] is not None:
            rows.append([f"adaptive draws, {name}", f"V of score x {adaptive[key]:.2f} at equal total"])
    for name, loss in found["loss"].items():
        bias = f"{loss['bias']:+.2g} +- {loss['std_error']:.1g}"
        rows.append([f"loss, correction {name}", f"bias {bias}, variance {_number(loss['variance'])}"])
    for name, ratio in found["gradient"].items():
        rows.append([f"gradient, correction {name}", f"V of gradient x {_times(ratio)}"])
    rows.append(
        [
            "upper-bound mixture, half and half",
            f"V of score x {_times(upper['score_variance_ratio'])}, "
            f"of gradient x {_times(upper['gradient_variance_ratio'])}; the bound lies "
            f"{upper['bound_above_elbo']:.2f} nats above B(y_l), which moves the score by "
            f"{upper['score_change']:+.3f}",
        ]
    )
    return markdown(["technique", "measured"], rows)


def _times(ratio: float | None) -> str:
    """A ratio, or the mark of one to nothing."""
    return "–" if ratio is None else f"{ratio:.2f}"


def _number(value: float) -> str:
    return f"{value:.3g}"
