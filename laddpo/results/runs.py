"""Run folders read as data: settings, curves, results, and what tells one run from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from laddpo.errors import UserError
from laddpo.results.of_jobs import SWEEP_FILE, SWEEP_KEYS, as_settings, job_state
from laddpo.storage import atomic, json_lines, manifests
from laddpo.storage.seals import CheckedLines, read_checked, read_checked_text, sealed_file

FINISHED = "finished"
ROUNDS_FILE = "rounds.json"
NOT_COMPARED = ("output_dir", "resume", "run", "runs", "paths.", "logger.", "export.", "report.", "auto")


@dataclass
class Run:
    """One run's folder, read. `overrides`: what tells it from the others; `state`: how it ended, in words."""

    name: str
    folder: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    results: dict[str, Any]
    evaluation: Path
    fields: dict[str, Any]
    state: str
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return self.state == FINISHED

    def value(self, metric: str) -> float | None:
        """The metric as results.json has it; with `validation/` before it, the last one logged during training."""
        entry = self.results.get(metric)
        if isinstance(entry, Mapping):
            return entry.get("tuned", entry.get("base"))
        logged = [row[metric] for row in self.metrics if row.get(metric) is not None]
        return logged[-1] if logged and metric.startswith("validation/") else None

    def rank(self, metric: str | None) -> float | None:
        """The value by which it is compared with other runs; None where it is not finished or not measured."""
        return self.value(metric) if metric and self.is_finished else None

    def measured(self) -> list[str]:
        """Names that `value` knows."""
        compared = [n for n, e in self.results.items() if isinstance(e, Mapping) and ("tuned" in e or "base" in e)]
        return [*compared, *sorted({key for row in self.metrics for key in row if key.startswith("validation/")})]

    def interval(self, metric: str) -> tuple[float, float] | None:
        entry = self.results.get(metric)
        found = entry.get("tuned_interval", entry.get("base_interval")) if isinstance(entry, Mapping) else None
        return tuple(found) if found else None

    def margins(self) -> list[float]:
        """The tuned model's reward margin of each held-out pair."""
        pairs = _of_evaluation(self.folder, self.evaluation, "pairs.jsonl")
        return [row["margin"] for row in json_lines.JsonLines(pairs).read() if "margin" in row]

    def answers(self) -> list[dict[str, Any]]:
        """What base and tuned answered."""
        return CheckedLines(_of_evaluation(self.folder, self.evaluation, "items.jsonl")).read()


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders; a folder with sweep.json gives its jobs. Raises `UserError` for others."""
    found: list[Run] = []
    problems = []
    for folder in folders:
        if (folder / SWEEP_FILE).exists():
            jobs = read_checked(folder / SWEEP_FILE, SWEEP_KEYS)["jobs"]
            found += [_sweep_job(folder, job) for job in jobs]
        elif (folder / "config.yaml").exists():
            found.append(read_run(folder))
        else:
            problems.append(
                f"{folder}: holds neither config.yaml (a run) nor {SWEEP_FILE} (a sweep); expected outputs/train/<run> "
                "or outputs/sweep/<sweep>; check run= and runs=."
            )
    if problems:
        raise UserError(*problems)
    _tell_apart(found)
    return found


def read_run(folder: Path) -> Run:
    """A training run with its evaluation, or an evaluation by itself. Unfinished ones are read as far as they go."""
    evaluation = folder / "evaluation" if (folder / "evaluation").is_dir() else folder
    manifest = folder / manifests.MANIFEST
    settings = folder / "config.yaml"
    found = manifests.unsealed(manifest) if manifest.exists() else None
    is_ours = isinstance(found, dict) and isinstance(found.get("kind"), str)
    sealed = manifests.read_manifest(folder, found["kind"]) if is_ours else {}
    if not is_ours:
        _require_logged(folder)
    results = _of_evaluation(folder, evaluation, "results.json")
    is_finished = manifest.exists() or (evaluation == folder and results.exists())
    return Run(
        name=folder.name,
        folder=folder,
        settings=_flat(_read_settings(settings)) if settings.exists() else {},
        metrics=json_lines.JsonLines(folder / "metrics.jsonl").read(),
        timing=json_lines.JsonLines(folder / "timing.jsonl").read(),
        results=atomic.read_json(results) if results.exists() else {},
        evaluation=evaluation,
        fields=sealed["fields"] if is_ours else {},
        state=FINISHED if is_finished else "not finished",
    )


def read_rounds(folder: Path) -> dict[str, Any]:
    """rounds.json of a run of several rounds that has ended, else {}."""
    path = sealed_file(folder, ROUNDS_FILE)
    return atomic.read_json(path) if path.exists() else {}


def _of_evaluation(folder: Path, evaluation: Path, name: str) -> Path:
    """A file of the run's evaluation, which the run's own manifest seals."""
    return sealed_file(folder, (evaluation / name).relative_to(folder).as_posix())


def _require_logged(folder: Path) -> None:
    """An unfinished run has no manifest, but its newest checkpoint seals the metrics up to its step."""
    from laddpo.storage.checkpoint import STATE, step_folders

    log, newest = folder / "metrics.jsonl", step_folders(folder / "checkpoints")[:1]
    if newest and (newest[0] / manifests.MANIFEST).exists():
        state = atomic.read_json(sealed_file(newest[0], STATE))
        if log.exists():
            json_lines.JsonLines(log).require(state["metrics"])
        elif state["metrics"]["bytes"]:
            print(f"note: {log}: is missing; the page shows no curves of this run.")


def _read_settings(path: Path) -> dict[str, Any]:
    """config.yaml of any version, as data."""
    try:
        found = yaml.safe_load(read_checked_text(path))
    except yaml.YAMLError as error:
        raise UserError(
            f"{path}: is not a whole yaml file ({' '.join(str(error).split())}); restore it, or leave the run out."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no settings; restore it, or leave the run out.")
    return found


def _sweep_job(folder: Path, job: Mapping[str, Any]) -> Run:
    run = read_run(folder / job["folder"])
    run.name = f"{folder.name}/{job['folder']}"
    run.state = job_state(job["exit_code"], bool(run.settings))
    run.overrides = as_settings(job["overrides"])
    return run


def _tell_apart(found: Sequence[Run]) -> None:
    """The settings in which the runs differ. For a sweep: the overrides in which its jobs differ."""
    keys = sorted({key for run in found for key in run.settings if not key.startswith(NOT_COMPARED)})
    different = [key for key in keys if len({str(run.settings.get(key)) for run in found}) > 1]
    given = {key for run in found for key in run.overrides}
    varied = {key for key in given if len({run.overrides.get(key) for run in found}) > 1}
    for run in found:
        if run.overrides:
            run.overrides = {key: value for key, value in run.overrides.items() if key in varied}
        else:
            run.overrides = {key: run.settings.get(key, "-") for key in different}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}
