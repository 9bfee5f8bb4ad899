"""The variance table as a page, for the terminal and as a picture. Takes the content of variance.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laddpo.estimator_study.answers import answer, number, step_section, times, token_section
from laddpo.estimator_study.answers import with_interval as shown_value
from laddpo.estimator_study.noise import BASELINE
from laddpo.estimator_study.techniques import TECHNIQUES
from laddpo.estimator_study.tokens import FLAGGED
from laddpo.results.figures import ACCENT, DARK, PALE, RULE, drawn, new_figure, save_png, say_nothing, tidy
from laddpo.results.tables import aligned, markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ["setting", "n", "V of score", "x", "V of loss", "V of gradient", "x", "V of B(y_w)", "own V / V"]


def markdown_page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    moved = result["drift"]
    trained = f"run {result['run']}" if result["run"] else "before training"
    lines = [
        f"# Noise of a step's gradient: {result['model']} on {result['data']}",
        "",
        answer(result),
        "",
        f"{result['pairs']} training pairs of {result['prompts']} prompts ({result['response_tokens']}), each "
        f"evaluated {result['evaluations']} times with fresh masks; {result['gradient_pairs']} of them with gradients "
        f"over {result['trainable_parameters']:,} trainable parameters; loss {result['loss']}, beta "
        f"{result['beta']:g}, {trained}. Square brackets hold 95% intervals over pairs and their evaluations.",
        "",
        *step_section(result),
        *token_section(result),
        "## Every way to draw masks",
        "",
        "Variances are means over pairs of the variance over evaluations, at equal forwards of each row's n. V of "
        f"gradient: that of one pair, over its masks alone. x: ratio to {BASELINE} at the same n, pair by pair, if it "
        "was measured. own V / V: the variance that a pair's own draws estimate, over the measured one. The row own "
        "has the run's own draws.",
        "",
        "Nothing is trained yet, so policy and reference are the same: with common masks scores and losses do not vary "
        "at all, and gradients do."
        if result["is_start"]
        else f"Training moved B(y_w) {_moved(moved['chosen'])} and B(y_l) {_moved(moved['rejected'])}.",
        "",
        markdown(HEADER, [_cells(row, with_interval=True) for row in result["settings"]]),
        "",
        "![variances](variance.png)",
        "",
    ]
    for draws, found in result["techniques"].items():
        lines += [f"## Beyond the masks, n = {draws}, relative to the default", "", _technique_table(found), ""]
    if result["techniques"]:
        sources = [[name, row.source, row.idea] for name, row in TECHNIQUES.items()]
        lines += ["## Where each comes from", "", markdown(["technique", "source", "idea"], sources), ""]
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
    """Steps of equal forwards and the largest tokens; below them score and gradient variance of every row, with
    intervals, on a log axis."""
    rows = result["settings"]
    names = list(dict.fromkeys(row["setting"] for row in rows))
    draws = sorted({row["draws"] for row in rows})
    height = 1.9 + 0.17 * len(names) * max(2, len(draws))
    figure = new_figure(12.5, 3.6 + height, f"Noise of a step's gradient: {result['model']} on {result['data']}")
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, height])
    steps, tokens = above.subplots(1, 2)
    _draw_steps(steps, result)
    _draw_tokens(tokens, result["tokens"])
    left, right = below.subplots(1, 2, sharey=True)
    for axes, column, title in (
        (left, "score", "variance of the score"),
        (right, "gradient", "variance of one pair's gradient over masks"),
    ):
        if not any(row[column]["value"] > 0 for row in rows):
            say_nothing(axes, "no variance: nothing is trained yet")
            continue
        _draw_points(axes, rows, names, draws, column)
        tidy(axes, title)
        axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.7)
    (left if left.axison else right).set_yticks(range(len(names)), names, fontsize=8)
    right.set_ylim(len(names) - 0.5, -0.5)
    right.tick_params(labelleft=not left.axison)
    below.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside right", title="draws", title_fontsize=8)
    save_png(figure, path)


def _draw_steps(axes: Axes, result: Mapping[str, Any]) -> None:
    """Noise of a step at equal forwards, stacked: what pairs bring and what masks bring."""
    rows = [row for row in result["step_noise"] if row["pairs_per_step"]]
    own = next(row["noise"]["value"] for row in rows if row["draws"] == result["step"]["draws"])
    parts = [
        [max(0.0, row[name]["value"]) / row["pairs_per_step"] / own for row in rows] for name in ("between", "within")
    ]
    places = range(len(rows))
    axes.bar(places, parts[0], 0.6, color=PALE, label="pairs")
    axes.bar(places, parts[1], 0.6, bottom=parts[0], color=ACCENT, hatch="//", edgecolor="white", label="masks")
    for place, row in zip(places, rows, strict=True):
        found = row.get("relative")
        if found and found["interval"]:
            low, high = found["interval"]
            reach = [[found["value"] - low], [high - found["value"]]]
            axes.errorbar(place, found["value"], yerr=reach, color=DARK, capsize=3, linewidth=1.1)
    axes.axhline(1, color=RULE, linewidth=0.8, linestyle=":")
    labels = [f"n = {row['draws']}\n{row['pairs_per_step']} pairs" for row in rows]
    axes.set_xticks(places, labels, fontsize=8)
    tidy(axes, "noise of a step at equal forwards, over the run's own")
    axes.legend(fontsize=8)


def _draw_tokens(axes: Axes, tokens: Sequence[Mapping[str, Any]]) -> None:
    if not tokens:
        say_nothing(axes, "no tokens were measured (variance.token_pairs=0)")
        return
    shares = sorted((row["share"] or 0.0 for row in tokens), reverse=True)
    axes.bar(range(1, len(shares) + 1), shares, 0.7, color=[ACCENT if share > FLAGGED else PALE for share in shares])
    axes.axhline(FLAGGED, color=RULE, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1)
    axes.set_xticks(range(1, len(shares) + 1))
    axes.set_xlabel("pairs, the largest share first", fontsize=8)
    tidy(axes, "largest token's share of a pair's gradient")


def _draw_points(axes: Axes, rows: Sequence[Mapping], names: list[str], draws: list[int], column: str) -> None:
    colors, markers = [PALE, ACCENT, DARK, RULE], ["s", "^", "o", "D"]
    axes.set_xscale("log")
    for k, n in enumerate(draws):
        shown = [row for row in rows if row["draws"] == n and row[column]["value"] > 0]
        values = [row[column]["value"] for row in shown]
        places = [names.index(row["setting"]) + 0.16 * (k - (len(draws) - 1) / 2) for row in shown]
        between = [row[column]["interval"] or [row[column]["value"]] * 2 for row in shown]
        low, high = (np.array([interval[side] for interval in between]) for side in (0, 1))
        errors = [np.maximum(values - low, 0), np.maximum(high - values, 0)]
        style = {"color": colors[k % 4], "marker": markers[k % 4], "markersize": 4.5, "linewidth": 0, "elinewidth": 1.1}
        axes.errorbar(values, places, xerr=errors, label=f"n = {n}", **style)
        for row, value in zip(shown, values, strict=True):
            if row["setting"] == BASELINE:
                axes.axvline(value, color=colors[k % 4], linewidth=0.8, linestyle=":")


def _cells(row: Mapping[str, Any], with_interval: bool) -> list[str]:
    def value(name: str) -> str:
        return shown_value(row[name]) if with_interval else number(row[name]["value"])

    def ratio(name: str) -> str:
        if "ratio" not in row[name]:
            return ""
        found = {"value": row[name]["ratio"], "interval": row[name]["ratio_interval"] if with_interval else None}
        return shown_value(found, times)

    own = "" if row["own_estimate"] is None else f"{row['own_estimate']:.2f}"
    shown = [value("score"), ratio("score"), number(row["loss"]["value"]), value("gradient"), ratio("gradient")]
    return [row["setting"], str(row["draws"]), *shown, number(row["elbo"]["value"]), own]


def _technique_table(found: Mapping[str, Any]) -> str:
    control, adaptive, upper = found["control_variate"], found["adaptive_draws"], found["upper_bound"]
    rows = [
        [
            "control variate",
            f"V of score x {times(control['score_variance_ratio'])} with c = {control['coefficient']:.2f} and "
            f"{control['stored_draws']} stored draws; bias {number(control['bias_bound'])} at one standard error",
        ]
    ]
    for name, key in (("spread known", "known"), ("spread from own draws", "own")):
        if adaptive[key] is not None:
            rows.append([f"adaptive draws, {name}", f"V of score x {adaptive[key]:.2f} at equal total"])
    for name, loss in found["loss"].items():
        bias = f"{loss['bias']:+.2g} +- {loss['std_error']:.1g}"
        rows.append([f"loss, correction {name}", f"bias {bias}, variance {number(loss['variance'])}"])
    for name, ratio in found["gradient"].items():
        rows.append([f"gradient, correction {name}", f"V of gradient x {times(ratio)}"])
    rows.append(
        [
            "upper-bound mixture, half and half",
            f"V of score x {times(upper['score_variance_ratio'])}, "
            f"of gradient x {times(upper['gradient_variance_ratio'])}; the bound lies "
            f"{upper['bound_above_elbo']:.2f} nats above B(y_l), which moves the score by "
            f"{upper['score_change']:+.3f}",
        ]
    )
    return markdown(["technique", "measured"], rows)
