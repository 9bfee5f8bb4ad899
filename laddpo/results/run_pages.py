"""What a report is made of: run folders read as data, the chosen metric, the blocks of the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from laddpo.errors import UserError, nearest
from laddpo.results.meanings import explained
from laddpo.results.of_jobs import FINAL, VALIDATION, is_higher_better, unmeasured
from laddpo.results.page import heat_table, html, picture, wide_picture
from laddpo.results.run_blocks import change_text, headline, metric_text, run_blocks
from laddpo.results.runs import Run
from laddpo.results.sweep_plots import sweep_plot
from laddpo.results.sweeps import SweepJob, SweepTable, number_text, sweep_table
from laddpo.results.tables import sweep_rows
from laddpo.settings.schema import ReportSettings

HEAT_KEYS = ("dpo.beta", "dpo.diffusion_samples")
FACTS = {"step kept": "Weights of step {}", "peak GiB": "peak {} GiB", "minutes": "{} minutes"}
END = "Intervals are 95%; base is the model before training."


def chosen_metric(found: Sequence[Run], wanted: str | None) -> str | None:
    """`wanted`, else the first usual result that any finished run has; None where there is none."""
    known = list(dict.fromkeys(name for run in found for name in run.measured()))
    if wanted is not None:
        if wanted not in known and f"validation/{wanted}" in known:
            return f"validation/{wanted}"
        if wanted not in known:
            guess = nearest(wanted, known)
            hint = f"did you mean {guess}?" if guess else "choose one of them."
            raise UserError(
                f"report.metric is {wanted!r}; these runs measured: {', '.join(known) or 'nothing'}; {hint}"
            )
        return wanted
    known = list(dict.fromkeys(name for run in found if run.is_finished for name in run.measured()))
    of_tasks = [name for name in known if name.endswith("/exact_match") and name not in VALIDATION]
    usual = (FINAL[0], *of_tasks, *FINAL[1:], *VALIDATION)
    return next((name for name in usual if name in known), None)


def report_page(found: Sequence[Run], settings: ReportSettings, plots: Path) -> str:
    """The page; its pictures are also written into `plots`."""
    metric = chosen_metric(found, settings.metric)
    if len(found) == 1:
        return _page_of_one(found[0], metric, settings, plots)
    ordered = _sorted(found, metric)
    blocks = [_overview(ordered, found, metric), _comparison(found, metric, plots) if metric else ""]
    for run in ordered:
        parts = run_blocks(run, settings.examples, plots / run.name.replace("/", "_"))
        blocks.append(html.folded(_heading(run), parts, is_open=run is ordered[0]))
    unfinished = sum(not run.is_finished for run in found)
    summary = f"Sorted by {metric}. " if metric else ""
    summary += f"{unfinished} of {len(found)} unfinished, listed separately. " if unfinished else ""
    return html.page(f"{len(found)} runs", _best_of(ordered, metric), summary + END, blocks)


def _page_of_one(run: Run, metric: str | None, settings: ReportSettings, plots: Path) -> str:
    """The result as a sentence, then base and tuned beside each other; what was not compared has one row of numbers."""
    answer = headline(run, metric)
    header, (row,) = (_run_rows if run.is_finished else _rest_rows)([run], metric)
    blocks = [html.section("Result" if answer else run.name, *run_blocks(run, settings.examples, plots))]
    if not answer:
        state = "" if run.is_finished else f"This run is {run.state}. "
        return html.page(run.name, "", state + END, [html.section("Result", html.table(header, [row])), *blocks])
    facts = [FACTS[name].format(cell) for name, cell in zip(header, row, strict=True) if name in FACTS]
    return html.page(run.name, answer, f"{', '.join(facts)}. {END}" if facts else END, blocks)


def _best_of(ordered: Sequence[Run], metric: str | None) -> str:
    """The best run's result in a sentence; that it was chosen by this very result is said."""
    ranked = [run for run in ordered if run.rank(metric) is not None]
    answer = headline(ranked[0], metric) if ranked else ""
    if len(ranked) < 2 or not answer:
        return answer
    return (
        f"Best of {len(ranked)} finished runs, {_heading(ranked[0])}: {answer}The best of several looks better than it "
        "is: confirm it with another seed."
    )


def _heading(run: Run) -> str:
    state = [] if run.is_finished else [run.state]
    return ", ".join([run.name, *(f"{key}={value}" for key, value in list(run.overrides.items())[:4]), *state])


def _sorted(found: Sequence[Run], metric: str | None) -> list[Run]:
    """Best first; then those that are not ranked."""
    sign = -1 if is_higher_better(metric) else 1
    return sorted(found, key=lambda run: (run.rank(metric) is None, sign * (run.rank(metric) or 0.0)))


def _overview(ordered: Sequence[Run], found: Sequence[Run], metric: str | None) -> str:
    """One line for each run, best first; then a table of the runs that are not ranked."""
    ranked = [run for run in ordered if run.rank(metric) is not None]
    rest = [run for run in found if run not in ranked]
    blocks = [html.table(*_run_rows(ranked, metric), 0)] if ranked else []
    if rest:
        why = f"Not ranked: no final {metric.replace('_', ' ')}." if metric else "Not ranked: no result is final."
        blocks += [html.paragraph(why), html.table(*_rest_rows(rest, metric))]
    header = [name for rows in (_run_rows(ranked, metric), _rest_rows(rest, metric)) for name in rows[0]]
    return html.section("Runs", *blocks, html.words(explained(header)))


def _varied(found: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in found for key in run.overrides))[:6]


def _rest_rows(found: Sequence[Run], metric: str | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of runs that are not ranked: how they ended, and what they measured so far."""
    varied = _varied(found)
    header = ["run", *(key.rsplit(".", 1)[-1].replace("_", " ") for key in varied), "state", "step"]
    rows = []
    for run in found:
        steps = [row["step"] for row in run.metrics if "step" in row]
        settings = [str(run.overrides.get(key, "-")) for key in varied]
        rows.append([run.name, *settings, run.state, str(steps[-1]) if steps else "-"])
    for name in dict.fromkeys((*([metric] if metric else []), *FINAL, *VALIDATION)):
        if any(run.value(name) is not None for run in found):
            header.append(f"{name.replace('_', ' ')}{' so far' if name.startswith('validation/') else ''}")
            for run, row in zip(found, rows, strict=True):
                row.append(change_text(run, name))
    return header, rows


def _run_rows(found: Sequence[Run], metric: str | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of runs in their order."""
    shown = [name for name in dict.fromkeys((metric, *FINAL, "reward_margin")) if name]
    shown = [name for name in shown if any(run.value(name) is not None for run in found)]
    varied = _varied(found) if len(found) > 1 else []
    header = ["run", *(key.rsplit(".", 1)[-1].replace("_", " ") for key in varied)]
    for name in shown:
        header += [name.replace("_", " "), "interval"] if name == metric else [name.replace("_", " ")]
    header += ["validation loss", "chosen fall", "step kept", "peak GiB", "minutes"]
    rows = []
    for run in found:
        row = [run.name, *(str(run.overrides.get(key, "-")) for key in varied)]
        for name in shown:
            row.append(change_text(run, name))
            if name == metric:
                low_high = run.interval(name)
                row.append("-" if low_high is None else "{} to {}".format(*(metric_text(name, x) for x in low_high)))
        row += [_logged(run, "validation/loss"), _logged(run, "validation/chosen_fall")]
        kept = run.fields.get("best_step", run.fields.get("step"))
        peak = max((r["memory/peak_gib"] for r in run.timing if "memory/peak_gib" in r), default=None)
        seconds = sum(r.get("seconds", 0) + r.get("evaluation_seconds", 0) for r in run.timing)
        row += [
            "-" if kept is None else str(kept),
            "-" if peak is None else f"{peak:.2f}",
            f"{seconds / 60:.1f}" if seconds else "-",
        ]
        rows.append(row)
    empty = [i for i in range(1, len(header)) if all(row[i] == "-" for row in rows)]
    header, *rows = ([cell for i, cell in enumerate(row) if i not in empty] for row in (header, *rows))
    return header, rows


def _logged(run: Run, name: str) -> str:
    values = [row[name] for row in run.metrics if name in row]
    return number_text(float(values[-1])) if values else "-"


def _comparison(found: Sequence[Run], metric: str, plots: Path) -> str:
    """Heat maps and lines over what varied."""
    jobs = []
    for run in found:
        value = run.rank(metric)
        state = unmeasured(metric) if run.is_finished and value is None else run.state
        jobs.append(SweepJob(run.overrides, value, run.interval(metric), str(run.folder), state))
    whole = sweep_table(jobs, metric, is_higher_better(metric))
    if not whole.keys:
        return ""
    sweep_plot(whole, plots / "sweep.png")
    blocks = [html.table(*sweep_rows(whole), 0)] if len(whole.cells) < len(found) else []
    if len(whole.keys) == 2:
        blocks += [heat_table(whole), html.paragraph(_legend(whole))]
    else:
        blocks += _heat_over_others(jobs, whole, plots) if set(HEAT_KEYS) < set(whole.keys) else []
        show = picture if len(whole.keys) == 1 else wide_picture  # many settings need room for their names
        shown = show(plots / "sweep.png", f"{metric} over {' and '.join(whole.keys)}")
        blocks.append(html.gallery([shown], True) if show is picture else shown)
    return html.section(f"{metric.replace('_', ' ')} over {', '.join(whole.keys)}", *blocks)


def _legend(table: SweepTable) -> str:
    """How to read a heat map."""
    measured = "on validation" if table.metric in VALIDATION else "in the final evaluation"
    jobs = sum(job.is_ranked for cell in table.cells for job in cell.jobs)
    best = table.tie_text or "★ is the best"
    return f"Brighter is better. {best}: {table.metric.replace('_', ' ')} {measured}, among {jobs} finished jobs."


def _heat_over_others(jobs: Sequence[SweepJob], whole: SweepTable, plots: Path) -> list[str]:
    """beta x diffusion_samples, the mean over everything else that varied."""
    two = [dataclasses.replace(job, overrides={k: job.overrides.get(k, "default") for k in HEAT_KEYS}) for job in jobs]
    heat = sweep_table(two, whole.metric, whole.is_higher_better)
    sweep_plot(heat, plots / "heat_map.png")
    others = ", ".join(key for key in whole.keys if key not in HEAT_KEYS)
    words = html.paragraph(f"Each cell is the mean over {others}.")
    return [words, heat_table(heat), html.paragraph(_legend(heat))]
