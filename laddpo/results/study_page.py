"""A study's page and picture. Takes the content of study.json (`laddpo/results/studies.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laddpo.results.figures import DARK, PALE, RULE, drawn, new_figure, save_png, tidy
from laddpo.results.stats import DRIFT, mean_with_error
from laddpo.results.sweeps import number_text
from laddpo.results.tables import markdown, points_text

INTRODUCTION = """\
One factor at a time is changed around the default arm. Exact match is on test problems that neither training nor the
choice of a checkpoint has seen. Differences are paired by problem and averaged over the seeds that both arms have.
Their 95% intervals count seeds and problems (Student's t over seeds; below three seeds, problems alone). The sentences
under "What it decides" are corrected for their number. Intervals and readings of the tables are not: of twenty arms
that are equal, one would be said to differ. ± is the standard error over seeds. "kept / last" is validation exact match
of the checkpoint that was kept and of the last step: a large gap means that training on destroys what it had won.
"chosen fall" is by how much of its start the log-likelihood of held-out chosen answers fell at the kept step; negative:
it rose. "score variance" is the mean over the training steps. With several rounds these two, and reward accuracy, are
the last round's.
An arm whose interval includes 0 is not said to help."""
GROUPS = """\
Right answers before and after, of all seeds together. "habit": the problems on which the habit of the base's corpus
gives a wrong answer; "no habit": all others. "unseen": no question of training has the step where the habit shows."""
GROUP_HEADER = ("arm", "problems", "right", "difference")
HEADER = (
    "arm",
    "seeds",
    "exact match",
    "over the base",
    "difference",
    "reading",
    "validation kept / last",
    "reward accuracy",
    "score variance",
    "chosen fall",
    "tokens",
    "ended",
)


def study_markdown(content: Mapping[str, Any], title: str, command: str) -> str:
    """The page."""
    blocks = [f"# {title}", f"`{command}`", INTRODUCTION]
    if content["missing"]:
        blocks.append(f"Not finished: {', '.join(content['missing'])}.")
    if content.get("unfinished"):
        runs_of_it = ", ".join(f"{run['run']} ({run['state']})" for run in content["unfinished"])
        blocks.append(f"Runs that are in no number below: {runs_of_it}.")
    count = sum(claim["p"] is not None for claim in content["claims"])
    counted = f"{count} claims, chosen before the runs. p is corrected for their number (Holm 1979)."
    blocks += ["## What it decides", counted, "\n".join(f"- {claim['text']}" for claim in content["claims"])]
    by_factor: dict[str, list] = {}
    for row in content["arms"]:
        by_factor.setdefault(row["factor"], []).append(row)
    default = next((row for row in content["arms"] if row["arm"] == row["against"]), None)
    for factor, rows in by_factor.items():
        shown = rows if default is None or default in rows else [default, *rows]
        blocks += [f"## {factor}", markdown(HEADER, [_cells(row) for row in shown])]
    if grouped := [_group_cells(row, group) for row in content["arms"] for group in row["groups"]]:
        blocks += ["## Where the habit shows, and elsewhere", GROUPS, markdown(GROUP_HEADER, grouped)]
    drifted = [line for row in content["arms"] for line in _drift_lines(row)]
    blocks += ["## Length and ends of answers", "\n".join(drifted) or f"No arm moved either by more than {DRIFT:.0%}."]
    settings = [[row["arm"], row["stage"], " ".join(row["overrides"]) or "-"] for row in content["arms"]]
    blocks += ["## Arms", markdown(["arm", "stage", "settings"], settings), "![differences](study.png)"]
    return "\n\n".join(blocks) + "\n"


@drawn
def study_plot(content: Mapping[str, Any], path: Path, title: str) -> None:
    """Exact match over the model before training, with its interval, and a point for every seed; by factor."""
    rows = content["arms"]
    figure = new_figure(8.0, max(2.6, 0.33 * len(rows) + 1.4), title)
    axes = figure.subplots()
    tidy(axes, "exact match over the model before training, points (95% interval over seeds and problems)")
    for place, row in enumerate(rows):
        found = row["against_base"]
        axes.hlines(place, *(100 * bound for bound in found["interval"]), color=PALE, linewidth=6)
        axes.plot([100 * value for value in found["by_seed"]], [place] * len(found["by_seed"]), "|", color=RULE)
        axes.plot(100 * found["difference"], place, "o", color=DARK)
    axes.axvline(0, color=RULE, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.7)
    save_png(figure, path)


def _cells(row: Mapping[str, Any]) -> list[str]:
    facts, base, against = row["facts"], row["against_base"], row["difference"]
    spread = mean_with_error(row["exact_match_by_seed"]).std_error
    own = f"{row['exact_match']:.1%}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")

    def fact(name: str, percent: bool = False) -> str:
        value = facts.get(name)
        return "-" if value is None else f"{value:.1%}" if percent else number_text(value)

    difference_text = "-"
    if against is not None:
        name = f" ({row['against']})" if row["against"] else ""
        difference_text = points_text(against["difference"], *against["interval"]) + name
    tokens = f"{fact('answer_tokens_base')} → {fact('answer_tokens_tuned')}"
    return [
        row["arm"],
        str(len(row["seeds"])),
        own,
        points_text(base["difference"], *base["interval"]),
        difference_text,
        _reading(against),
        f"{fact('validation_kept', True)} / {fact('validation_last', True)}",
        fact("reward_accuracy", True),
        fact("score_variance"),
        fact("chosen_fall", True),
        tokens,
        fact("ended_rate_tuned", True),
    ]


def _group_cells(row: Mapping[str, Any], group: str) -> list[str]:
    found = row["groups"][group]
    counts = f"{found['base']:,} → {found['tuned']:,} of {found['items']:,}"
    return [row["arm"], group, counts, points_text(found["difference"], *found["interval"])]


def _reading(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def _drift_lines(row: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, words in (("answer_tokens", "tokens of an answer"), ("ended_rate", "share of answers that end")):
        before, after = (row["facts"].get(f"{name}_{side}") for side in ("base", "tuned"))
        if before and after is not None and abs(after - before) > DRIFT * before:
            lines.append(f"- {row['arm']}: {words} {before:.3g} → {after:.3g}")
    return lines
