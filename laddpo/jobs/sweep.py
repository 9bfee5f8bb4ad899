"""Several jobs from one command line: `-m dpo.beta=0.5,1,2` runs each combination in a process of its own.

Hydra's sweeper and launcher decide which jobs there are and where they run (so joblib, submitit and sweeper plugins
work); the task handed to them starts `python -m laddpo.<stage>` with the job's overrides. Each job has a folder of its
own below outputs/sweep/<sweep>/, all share data/reference. Afterwards sweep.json lists overrides, exit codes, results.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from laddpo.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER, UserError
from laddpo.jobs import runner
from laddpo.jobs.runner import Jobs, quoted
from laddpo.results.of_jobs import (
    JOB_FILE,
    JOB_KEYS,
    SWEEP_FILE,
    find_results,
    job_objective,
    job_state,
    jobs_table,
    picture_sweep,
)
from laddpo.settings.compose import compose_tree
from laddpo.settings.of_a_run import read_command, write_command
from laddpo.settings.path_checks import path_problem
from laddpo.storage.folders import owned, refuse_others
from laddpo.storage.seals import damages, read_checked, write_checked


def run_sweep(
    hydra: Hydra, stage: str, config_name: str, config_dir: str | None, overrides: list[str], tree: DictConfig
) -> int:
    """Check all jobs, run them, and report; the exit code is 0 only if every job's is. `tree`: what they share."""
    own, rest = split_overrides(hydra, overrides)
    folder, is_resumed = sweep_folder(own, Path(tree.paths.outputs_dir))
    if is_resumed and (kept := runner.overrides_to_resume(folder, stage, rest)) != rest:
        rest, tree = kept, compose_tree(hydra, config_name, kept, RunMode.MULTIRUN)
    common = Jobs(folder, config_name, config_dir, is_resumed)
    jobs = planned_jobs(hydra, rest, tree)
    check_jobs(hydra, common, stage, jobs)

    with owned(folder, "sweep", is_resumed):
        if not read_command(folder):
            write_command(folder, rest, stage=stage)
        print(f"sweep of {len(jobs) if jobs else 'jobs chosen one after the other'} in {folder}")
        launch = [*rest, *_hydra_settings(folder, rest)]
        task = JobTask(common, stage, len(jobs) if jobs else None)
        with runner.forward_signals(folder), contextlib.suppress(_SweepStopped):
            try:
                hydra.multirun(config_name, task, launch, with_log_configuration=False)
            except HydraException as error:
                raise UserError(f"the sweep could not be started: {error}") from error
            finally:
                runner.signal_jobs(folder, signal.SIGTERM)  # a launcher's worker that died leaves its job behind

        records = write_sweep_file(folder, stage, jobs)
        picture_sweep(folder, records)
        print(jobs_table(records))
    print(folder)
    return exit_code(records)


def split_overrides(hydra: Hydra, overrides: list[str]) -> tuple[dict[str, object], list[str]]:
    """(output_dir and resume, which are the sweep's own; the overrides that go to the jobs)."""
    own: dict[str, object] = {}
    rest = []
    for override in OverridesParser.create(hydra.config_loader).parse_overrides(overrides):
        key = override.key_or_group
        if key in ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir"):
            raise UserError(
                f"{override.input_line}: a sweep's folder is named by output_dir; write output_dir=<folder>."
            )
        if key not in ("output_dir", "resume"):
            rest.append(override.input_line)
        elif override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: a sweep has one folder, and its jobs get theirs in it; give one value."
            )
        else:
            own[key] = override.value()
    return own, rest


def sweep_folder(own: dict[str, object], outputs_dir: Path) -> tuple[Path, bool]:
    """(the sweep's folder, whether an earlier sweep there is resumed); refuses a folder that holds another one."""
    resume = str(own.get("resume", False)).lower()
    given = own.get("output_dir")
    if resume not in ("true", "false") or (resume == "true" and given is None):
        raise UserError(
            f"resume is {own['resume']!r}; expected true and the sweep's folder: resume=true output_dir=<folder>."
        )
    if given is None:
        folder = outputs_dir / "sweep" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{secrets.token_hex(2)}"
    else:
        folder = Path(str(given)).expanduser()
    if problem := path_problem(str(folder)):
        raise UserError(f"output_dir is {str(folder)!r}; {problem}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir is {str(folder)!r}, a file; expected a folder for the sweep's jobs.")
    refuse_others(folder, ("sweep",), resume == "true")
    return folder, resume == "true"


def planned_jobs(hydra: Hydra, overrides: list[str], tree: DictConfig) -> list[list[str]]:
    """Overrides of every job of Hydra's basic sweeper; an empty list for sweepers that choose jobs as they go."""
    sweeper = tree.hydra.sweeper
    if not str(sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return []
    swept = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(hydra.config_loader).parse_overrides([*swept, *overrides])
    return BasicSweeper.split_arguments([override for override in parsed if not override.is_hydra_override()], None)[0]


def check_jobs(hydra: Hydra, common: Jobs, stage: str, jobs: list[list[str]]) -> None:
    """Refuse the sweep before its first job when any job's settings are wrong."""
    found = {}
    for number, overrides in enumerate(jobs):
        found[number] = runner.wrong_settings(hydra, common.config_name, stage, overrides)
        if common.is_resumed:
            place = common.folder / str(number)
            found[number] += [*runner.begun_otherwise(place, overrides), *damages(place)]
    runner.refuse_jobs(found, f"of {len(jobs)}")


def _hydra_settings(folder: Path, overrides: list[str]) -> list[str]:
    """Hydra keeps to deciding and launching: no log files, no .hydra folders, job folders below the sweep's."""
    settings = {
        "hydra.mode": "MULTIRUN",
        "hydra.sweep.dir": quoted(str(folder)),
        "hydra.sweep.subdir": "${hydra.job.num}",
        "hydra.output_subdir": "null",
        "hydra/hydra_logging": "none",
        "hydra/job_logging": "none",
    }
    given = {text.partition("=")[0] for text in overrides}
    return [f"{key}={value}" for key, value in settings.items() if key not in given]


@dataclass(frozen=True)
class JobTask:
    """What Hydra's launcher calls for each job: run it as a child process. Picklable, so that it can run elsewhere.

    Returns the job's number to maximise for sweepers that learn from it: the same measure for all jobs of the sweep,
    nan for a job that did not finish or does not have it.
    """

    common: Jobs
    stage: str
    count: int | None

    def __call__(self, tree: DictConfig) -> float:
        if runner.stop_requested.is_set():
            raise _SweepStopped
        hydra = HydraConfig.get()
        folder = Path(os.path.relpath(hydra.runtime.output_dir))
        overrides = [str(text) for text in hydra.overrides.task]
        done = folder / JOB_FILE
        if self.common.is_resumed and done.exists() and read_checked(done, JOB_KEYS).get("exit_code") == EXIT_DONE:
            print(f"job {hydra.job.num}: done before, {folder}")
        else:
            print(f"job {hydra.job.num}{f' of {self.count}' if self.count else ''}: {' '.join(overrides)}")
            code = runner.run_job(self.common, self.stage, overrides, folder)
            write_checked(done, {"overrides": overrides, "exit_code": code})
        return job_objective(self.common.folder, folder)


class _SweepStopped(BaseException):
    """Ends the sweeper's own loop: Hydra catches every Exception of a job."""


def write_sweep_file(sweep: Path, stage: str, jobs: list[list[str]]) -> list[dict[str, Any]]:
    """Gather the jobs' folders into sweep.json; a job that was planned and never ran has exit code null."""
    places = [path for path in sweep.glob(f"*/{JOB_FILE}") if path.parent.name.isdigit()]
    found = {int(path.parent.name): read_checked(path, JOB_KEYS) for path in places}
    records = []
    for number in sorted(found.keys() | set(range(len(jobs)))):
        folder = sweep / str(number)
        job = found.get(number) or {"overrides": jobs[number], "exit_code": None}
        records.append(
            {
                "job": number,
                **job,
                "state": job_state(job["exit_code"], (folder / "config.yaml").exists()),
                "folder": str(number),
                "results": find_results(folder),
            }
        )
    write_checked(sweep / SWEEP_FILE, {"stage": stage, "jobs": records})
    return records


def exit_code(records: list[dict[str, Any]]) -> int:
    """0 if all jobs are done; 75 if stopped; 2 if every failure was the user's; else 1."""
    codes = [record["exit_code"] for record in records]
    if all(code == EXIT_DONE for code in codes):
        return EXIT_DONE
    if runner.stop_requested.is_set():
        return EXIT_STOPPED
    return EXIT_USER if all(code in (EXIT_DONE, EXIT_USER) for code in codes) else EXIT_FAULT
