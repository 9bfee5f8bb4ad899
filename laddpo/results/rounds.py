"""Iterated DPO shown: exact match after every round, as a table, in words and as a picture.

All take the content of rounds.json. Each round is compared with the model before the first, paired by problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laddpo.results.figures import DARK, PALE, RULE, drawn, new_figure, save_png, tidy
from laddpo.results.tables import markdown, points_text

Content = Mapping[str, Any]


def rounds_text(content: Content) -> str:
    """The table of rounds, and in words whether more than one was worth it."""
    if "against_base" not in content:
        return f"{len(content['rounds'])} rounds; nothing was answered to compare them by (evaluation.tasks)."
    return f"{markdown(*rounds_rows(content))}\n\n{rounds_verdict(content)}"


def rounds_rows(content: Content) -> tuple[list[str], list[list[str]]]:
    """Header and rows of that table."""
    rows = [["0 (base)", f"{content['against_base'][0]['base']:.1%}", "", ""]]
    compared = zip(content["against_base"], content["against_round_before"], strict=True)
    for number, (total, gain) in enumerate(compared, 1):
        gains = (points_text(entry["difference"], *entry["interval"]) for entry in (total, gain))
        rows.append([str(number), f"{total['tuned']:.1%}", *gains])
    return ["round", "exact match", "over the base", "over the round before"], rows


def rounds_verdict(content: Content) -> str:
    """Whether the last round is better than the first."""
    last = content["last_against_first"]
    low, high = last["interval"]
    verdict = "more rounds helped" if low > 0 else "more rounds hurt" if high < 0 else "the interval includes 0"
    gain = points_text(last["difference"], low, high)
    return f"{len(content['rounds'])} rounds against 1: {gain} points on {last['items']} problems: {verdict}."


@drawn
def rounds_plot(content: Content, path: Path, title: str = "") -> None:
    """One PNG: exact match of the base and after each round, with 95% intervals."""
    entries = content["against_base"]
    values = [entries[0]["base"], *(entry["tuned"] for entry in entries)]
    bounds = [entries[0].get("base_interval"), *(entry.get("tuned_interval") for entry in entries)]
    figure = new_figure(5.0, 3.2, title)
    axes = figure.subplots()
    tidy(axes, f"Exact match by round, 95% intervals, {entries[0]['items']:,} problems")
    for place, (value, interval) in enumerate(zip(values, bounds, strict=True)):
        if interval is not None:
            axes.vlines(place, *interval, color=PALE, linewidth=7)
        axes.annotate(f"{value:.1%}", (place, value), (8, -10), textcoords="offset points", fontsize=9, va="center")
    axes.plot(range(len(values)), values, color=DARK, marker="o", linewidth=1.4)
    axes.axhline(values[0], color=RULE, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xticks(range(len(values)), ["base", *map(str, range(1, len(values)))], fontsize=9)
    axes.set_xlabel("round", fontsize=9)
    axes.set_xlim(-0.3, len(values) - 0.5)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    save_png(figure, path)
