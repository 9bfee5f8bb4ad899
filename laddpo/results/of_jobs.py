"""What the jobs of a sweep came to: how each ended, and finished jobs ranked by one measure that they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laddpo.errors import EXIT_DONE, EXIT_STOPPED
from laddpo.processes import terminal
from laddpo.storage.atomic import read_json, write_text
from laddpo.storage.json_lines import JsonLines
from laddpo.storage.seals import sealed_file

FINAL = ("exact_match", "win_rate", "reward_accuracy", "held_out_loss")  # of the final evaluation
USUAL = ("exact_match", "reward_accuracy")
VALIDATION = ("validation/exact_match", "validation/loss")
RESULT_COLUMNS = (*FINAL, *VALIDATION)  # in the order in which they rank jobs
LOWER_IS_BETTER = ("loss", "std_error", "variance", "kl", "chosen_fall")  # ends of names
JOB_FILE, JOB_KEYS = "job.json", ("overrides", "exit_code")
SWEEP_FILE, SWEEP_KEYS = "sweep.json", ("stage", "jobs")


def is_higher_better(metric: str | None) -> bool:
    return metric is None or not metric.endswith(LOWER_IS_BETTER)


def objective(results: Mapping[str, Any], columns: Sequence[str] = RESULT_COLUMNS) -> float:
    """The one number to maximise that says how good a job was: the first of `columns` that it has, losses with their
    sign changed; nan without any."""
    for name in columns:
        if _has_tuned(value := results.get(name)):
            return float(value["tuned"] if is_higher_better(name) else -value["tuned"])
    return math.nan


def ranking_metric(results: Iterable[Mapping[str, Any]]) -> str | None:
    """What jobs with these results are ranked by: the first of RESULT_COLUMNS that any of them has."""
    measured = {name for found in results for name in found}
    return next((name for name in RESULT_COLUMNS if name in measured), None)


def job_state(exit_code: int | None, has_begun: bool) -> str:
    """How a job ended, in words. A job that has begun and left no exit code was killed together with its sweep."""
    if exit_code is None:
        return "stopped" if has_begun else "not started"
    if exit_code in (EXIT_DONE, EXIT_STOPPED):
        return "finished" if exit_code == EXIT_DONE else "stopped"
    return f"failed (signal {-exit_code})" if exit_code < 0 else f"failed (exit code {exit_code})"


def unmeasured(metric: str) -> str:
    """The state of a finished job that cannot be ranked."""
    return f"finished, without {metric}"


def as_settings(overrides: Iterable[str]) -> dict[str, str]:
    """Overrides by key; those that are no assignment are left out."""
    return dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)


def picture_sweep(folder: Path, records: list[dict[str, Any]]) -> None:
    """sweep.md and plots/sweep.png over the results of finished jobs: the first of RESULT_COLUMNS that any has."""
    metric = ranking_metric(record["results"] for record in records if record["exit_code"] == EXIT_DONE)
    from laddpo.results.sweep_plots import sweep_plot
    from laddpo.results.sweeps import SweepJob, sweep_table
    from laddpo.results.tables import sweep_markdown

    jobs = []
    for record in records:
        is_finished = record["exit_code"] == EXIT_DONE
        entry = (record["results"].get(metric) or {}) if is_finished else {}
        state = _state(record)
        if is_finished and metric and "tuned" not in entry:
            state = unmeasured(metric)
        numbers = {name: value for name, value in record["results"].items() if _has_tuned(value)}
        measured = ", ".join(f"{name} {_shown(value)}" for name, value in numbers.items())
        interval = entry.get("tuned_interval")
        jobs.append(
            SweepJob(as_settings(record["overrides"]), entry.get("tuned"), interval, record["folder"], state, measured)
        )
    table = sweep_table(jobs, metric or "a result", is_higher_better(metric))
    write_text(folder / "sweep.md", sweep_markdown(table) + "\n")
    if metric is None:
        return
    name = metric.replace("_", " ")
    title = f"best {name} of a run" if metric in VALIDATION else f"{name} after training"
    sweep_plot(table, folder / "plots" / "sweep.png", title=title)


def _state(record: Mapping[str, Any]) -> str:
    return record.get("state") or job_state(record["exit_code"], has_begun=True)


def _has_tuned(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("tuned"), int | float)


def jobs_table(records: list[dict[str, Any]]) -> str:
    """One line for each job: what was varied, how it ended, what came out."""
    common = set.intersection(*(set(record["overrides"]) for record in records)) if len(records) > 1 else set()
    shown = [name for name in RESULT_COLUMNS if name in USUAL or any(name in r["results"] for r in records)]
    rows = [["job", "settings", "state", *shown]]
    for record in records:
        varied = " ".join(text for text in record["overrides"] if text not in common) or "-"
        state = _state(record)
        numbers = [_shown(record["results"].get(name)) for name in shown]
        rows.append([str(record["job"]), varied, state, *numbers])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    narrow = [[f"job {job}", *rest] for job, *rest in rows[1:]]
    return shown if terminal.fits(shown) else terminal.stacked(rows[0], narrow)


def _shown(value: Any) -> str:
    """`0.512 -> 0.634` of a before-and-after result."""
    if not isinstance(value, dict):
        return "-"
    numbers = [value.get(name) for name in ("base", "tuned")]
    return " -> ".join(f"{number:.3f}" for number in numbers if isinstance(number, int | float)) or "-"


def find_results(folder: Path) -> dict[str, Any]:
    """results.json of a job: its own when it evaluated, that of its evaluation when it trained; else, of a job without
    a final evaluation, its best validation values (base: at step 0); {} if there are none.

    With several rounds these are exact match in the last one: its loss and its base are against another reference.
    """
    from laddpo.storage.run_outputs import round_folders

    for name in ("results.json", "evaluation/results.json"):
        if (path := sealed_file(folder, name)).exists():
            return read_json(path)
    found = {}
    rounds = round_folders(folder)
    log = JsonLines(sealed_file(rounds[-1] if rounds else folder, "metrics.jsonl")).read()
    for name in VALIDATION[:1] if rounds else VALIDATION:
        rows = [record for record in log if record.get(name) is not None]
        if rows:
            best = (max if is_higher_better(name) else min)(record[name] for record in rows)
            has_base = rows[0]["step"] == 0 and not rounds
            found[name] = {"tuned": best, **({"base": rows[0][name]} if has_base else {})}
    return found


def job_objective(sweep: Path, folder: Path) -> float:
    """The objective of a job by the measure that ranks its sweep, which is that of the first finished job."""
    finished = {
        int(path.parent.name): path.parent
        for path in sweep.glob(f"*/{JOB_FILE}")
        if path.parent.name.isdigit() and read_json(path).get("exit_code") == EXIT_DONE
    }
    if not any(place.samefile(folder) for place in finished.values()):
        return math.nan
    metrics = (ranking_metric([find_results(finished[number])]) for number in sorted(finished))
    metric = next(filter(None, metrics), None)  # the first one's: it stays while jobs come in
    return objective(find_results(folder), [metric] if metric else [])
