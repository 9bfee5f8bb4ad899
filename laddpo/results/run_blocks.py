"""The blocks of a page that belong to one run: result, curves, rounds, answers, settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from laddpo.results.meanings import explained, in_order
from laddpo.results.page import html, picture
from laddpo.results.plots import constant_curves, evaluation_plot, margins_plot, panel_plots
from laddpo.results.rounds import rounds_plot, rounds_rows, rounds_verdict
from laddpo.results.runs import Run, read_rounds, read_run
from laddpo.results.sweeps import number_text
from laddpo.results.tables import before_after_rows, example_pairs, is_share, is_tied, notes_of
from laddpo.storage.run_outputs import round_folders


def headline(run: Run, metric: str | None) -> str:
    """The result in one sentence, if base and tuned were compared: `Exact match 58.5% → 88.8%, +30.2 points [...]. `"""
    entry = run.results.get(metric) if metric else None
    if not (run.is_finished and isinstance(entry, Mapping) and entry.get("interval") and "tuned" in entry):
        return ""
    name, items = metric.replace("_", " ").capitalize(), f"on {entry['items']:,} items"
    if is_tied(metric, run.results):
        bounds = "{:.1%}, {:.1%}".format(*entry["tuned_interval"]) if entry.get("tuned_interval") else "unknown"
        return f"{name} {entry['tuned']:.1%} [{bounds}] {items}; chance is 50%. "
    scale, unit = (100, " points") if is_share(metric, entry) else (1, "")
    bounds = entry["interval"]
    difference, low, high = (f"{scale * value:+.3g}" for value in (entry["difference"], *bounds))
    end = " The interval includes 0: no difference is shown." if bounds[0] <= 0 <= bounds[1] else ""
    return f"{name} {change_text(run, metric)}, {difference}{unit} [{low}, {high}] {items}.{end} "


def change_text(run: Run, name: str) -> str:
    entry = run.results.get(name)
    if isinstance(entry, Mapping) and "tuned" in entry:
        return f"{metric_text(name, entry['base'])} → {metric_text(name, entry['tuned'])}"
    value = run.value(name)
    return "-" if value is None else metric_text(name, value)


def metric_text(name: str, value: float) -> str:
    return f"{value:.1%}" if is_share(name, {"base": value, "tuned": value}) else number_text(float(value))


def run_blocks(run: Run, example_count: int, plots: Path) -> list[str]:
    """Everything about one run, the result first."""
    return [
        *_result_blocks(run, plots),
        *_round_blocks(run, plots),
        *_curve_blocks(run, plots),
        *_example_blocks(run, example_count),
        html.folded("Settings", [html.table(["setting", "value"], [[k, str(v)] for k, v in run.settings.items()])]),
    ]


def _result_blocks(run: Run, plots: Path) -> list[str]:
    results = in_order(run.results)
    header, rows = before_after_rows(results)
    compared = [name for name, entry in results.items() if isinstance(entry, Mapping) and "tuned" in entry]
    tied = [name for name in compared if is_tied(name, results)]
    for row in rows:
        if row[0] in (name.replace("_", " ") for name in tied):
            row[1] = "ties"
    blocks = [html.table(header, rows)]
    blocks += [html.paragraph(note) for note in notes_of(results)]
    if tied:
        blocks.append(html.paragraph(TIES))
    blocks.append(html.words(explained(compared)))
    pictures = []
    if rows:
        evaluation_plot(results, plots / "evaluation.png")
        pictures.append(picture(plots / "evaluation.png", "base and tuned with intervals"))
    margins = run.margins()
    if len(margins) > 1:  # one pair has no distribution
        margins_plot(margins, plots / "margins.png")
        pictures.append(picture(plots / "margins.png", "reward margins of held-out pairs"))
    blocks.append(html.gallery(pictures, True) if pictures else "")
    if buckets := run.results.get("by_length"):
        header = ["tokens, chosen and rejected", "pairs", "reward accuracy", "margin"]
        lines = [
            ["{} to {}".format(*b["tokens"]), str(b["pairs"]), f"{b['reward_accuracy']:.1%}", f"{b['margin']:.3f}"]
            for b in buckets
        ]
        blocks.append(html.folded("By length", [html.table(header, lines)]))
    return blocks


def _curve_blocks(run: Run, plots: Path) -> list[str]:
    """Curves that answer a question first and larger; those that never change as one line."""
    if not run.metrics:
        return []
    made = panel_plots(run.metrics, plots, timing=run.timing, best_step=run.fields.get("best_step") or None)
    made.sort(key=lambda each: each[0].title != "Exact match")  # first, where it is
    blocks = [html.heading("Training")]
    for is_main in (True, False):
        shown = [picture(path, panel.title, panel.meaning) for panel, path in made if panel.is_main == is_main]
        blocks.append(html.gallery(shown, is_main) if shown else "")
    blocks += [html.paragraph(row["note"]) for row in run.metrics if "note" in row]
    if constant := constant_curves(run.metrics, run.timing):
        shown = [(panel, f"{value} {panel.unit}".strip()) for panel, value in constant]
        line = "; ".join(f"{panel.title.lower()} {value}" for panel, value in shown)
        rows = [[panel.title, value, panel.meaning] for panel, value in shown]
        blocks.append(html.folded(f"Did not change: {line}", [html.table(["curve", "value", "what it is"], rows)]))
    return blocks


def _round_blocks(run: Run, plots: Path) -> list[str]:
    """What each round gained, and its curves."""
    blocks = []
    content = read_rounds(run.folder)
    if "against_base" in content:
        rounds_plot(content, plots / "rounds.png")
        shown = html.gallery([picture(plots / "rounds.png", "exact match by round with intervals")], True)
        blocks = [
            html.heading("Rounds"),
            html.table(*rounds_rows(content)),
            html.paragraph(rounds_verdict(content)),
            shown,
        ]
    for place in round_folders(run.folder):
        of_round = _curve_blocks(read_run(place), plots / place.name)
        blocks.append(html.folded(place.name.replace("_", " ").capitalize(), of_round) if of_round else "")
    return blocks


def _example_blocks(run: Run, count: int) -> list[str]:
    records = run.answers()
    blocks = []
    for task in dict.fromkeys(record["task"] for record in records) if count else ():
        sides = [[r for r in records if r["task"] == task and r["model"] == model] for model in ("base", "tuned")]
        pairs = example_pairs(*sides, count)
        if pairs:
            blocks.append(html.folded(f"Answers to {task}, differing ones first", [html.examples(pairs)]))
    return blocks


TIES = (
    "ties: the base is compared with itself, so its margin is 0 on every pair and it prefers no answer, nor does it "
    "win against itself. The difference is from chance, 50%."
)
