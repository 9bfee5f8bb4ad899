"""Many runs from one command: check all jobs first, run each as a child process, pass signals on to them.

Every job is an ordinary run of a stage in a folder of its own. Sweeps (sweep.py) and studies (arms.py) both use this:
they say which jobs there are and what is made of their results.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra

import laddpo
from laddpo.errors import EXIT_STOPPED, Damaged, UserError
from laddpo.results.of_jobs import JOB_FILE, JOB_KEYS
from laddpo.settings.compose import compose_tree, settings_problems
from laddpo.settings.of_a_run import AT_ONCE, COMMAND, read_command
from laddpo.storage.atomic import read_json, write_json
from laddpo.storage.locks import open_own
from laddpo.storage.seals import read_checked

PROCESS_FILE = "process.json"  # in a job's folder while it runs
# Settings of which a job's result knows nothing, as overrides begin.
CHANGE_NO_RESULT = (
    *("logger", "logging_steps=", "save_", "paths.", "auto=", "hardware.threads=", "hardware.vram_gib="),
    *("hydra.launcher", "hydra/launcher"),
)
stop_requested = threading.Event()  # no further job is started


@dataclass(frozen=True)
class Jobs:
    """What all jobs have in common. `folder` holds one folder per job."""

    folder: Path
    config_name: str
    config_dir: str | None
    is_resumed: bool


def wrong_settings(hydra: Hydra, config_name: str, stage: str, overrides: Sequence[str]) -> list[str]:
    """All that is wrong with the settings of a job."""
    try:
        return settings_problems(compose_tree(hydra, config_name, list(overrides)), stage)[1]
    except UserError as error:
        return list(error.problems)


def overrides_to_resume(folder: Path, stage: str, given: list[str]) -> list[str]:
    """The overrides of a resumed sweep: those that it was begun with, and from the command line those that change no
    result of a job. An earlier version kept none: then the command line has them all."""
    kept = read_command(folder)
    if not kept:
        return given
    if "stage" not in kept:
        raise Damaged(f"{folder / COMMAND}: is that of a run, not of a sweep.", "Restore it from a copy.")
    added = [text for text in given if text not in kept["overrides"]]
    other = [text for text in added if not text.lstrip("+").startswith(CHANGE_NO_RESULT)]
    if other or kept["stage"] != stage:
        begun = " ".join([kept["stage"], *(text for text in kept["overrides"] if text not in given)])
        raise UserError(
            f"{folder}: was begun with {begun}, not with {' '.join(other) or stage}; repeat the same command, or leave "
            "its settings out: a resumed sweep takes those of its folder."
        )
    return [*kept["overrides"], *added]


def begun_otherwise(folder: Path, overrides: Sequence[str]) -> list[str]:
    """The problem, if it is one, that the job in this folder was begun with other overrides."""
    path = folder / JOB_FILE
    if not path.exists():
        return []
    try:
        held, wanted = read_checked(path, JOB_KEYS)["overrides"], list(overrides)
    except UserError as error:
        return list(error.problems)
    held, wanted = ([text for text in a if not text.lstrip("+").startswith(CHANGE_NO_RESULT)] for a in (held, wanted))
    if held == wanted:
        return []
    was, now = ([text for text in a if text not in b] for a, b in ((held, wanted), (wanted, held)))
    if not was and not now:  # the same ones in another order
        was, now = held, wanted
    begun = f"was begun with {' '.join(was)}, " if was else "was begun "
    asked = f"{'not with' if was else 'without'} {' '.join(now)}" if now else "which is not asked for now"
    return [f"{folder.parent}: {begun}{asked}; repeat the same command, or choose another output_dir."]


def refuse_jobs(found: Mapping[Any, Sequence[str]], among: str, more: Sequence[str] = ()) -> None:
    """`UserError` if there are problems: each once, with the first five of the jobs that have it. `more` are of no
    single job."""
    where: dict[str, list[str]] = {}
    for job, problems in found.items():
        for problem in problems:
            where.setdefault(problem, []).append(str(job))
    told = [
        f"{problem} (job {', '.join(jobs[:5])}{', ...' if len(jobs) > 5 else ''} {among})"
        for problem, jobs in where.items()
    ]
    if told or more:
        raise UserError(*told, *more)


def run_job(jobs: Jobs, stage: str, overrides: Sequence[str], folder: Path, log: Path | None = None) -> int:
    """Run a job in a process of its own; its exit code. After a job that was stopped no other is started."""
    code = run_child(child_command(jobs, stage, overrides, folder), folder, log)
    if code == EXIT_STOPPED:
        stop_requested.set()
    return code


def quoted(text: str) -> str:
    """A text as a quoted value of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def child_command(jobs: Jobs, stage: str, overrides: Sequence[str], folder: Path) -> list[str]:
    """`python -m laddpo.<stage>` with a job's overrides and its own folder."""
    flags = ["--config-name", jobs.config_name]
    if jobs.config_dir is not None:
        flags += ["--config-dir", jobs.config_dir]
    own = [f"output_dir={quoted(str(folder))}", "hydra.mode=RUN"]
    if jobs.is_resumed and stage not in AT_ONCE:
        own.append("resume=true")
    return [sys.executable, "-m", f"laddpo.{stage}", *flags, *overrides, *own]


def run_child(command: list[str], folder: Path, log: Path | None = None) -> int:
    """The exit code of a job's process, whose process id is in the job's folder while it runs; `log` takes its output.

    It finds this package even where that is not installed. It has a session of its own, so that Ctrl-C reaches it
    exactly once, through `forward_signals`.
    """
    root = str(Path(laddpo.__file__).resolve().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*paths, root]))}
    with contextlib.ExitStack() as stack:
        streams = {}
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = open_own(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # appended to while the job runs
            stack.callback(os.close, output)
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        write_json(folder / PROCESS_FILE, {"pid": child.pid, "host": socket.gethostname()})
        try:
            return child.wait()
        finally:
            (folder / PROCESS_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def forward_signals(folder: Path) -> Iterator[None]:
    """Within the block, signals to stop go to the running jobs, and no further job is started."""
    stop_requested.clear()
    for left_behind in folder.glob(f"*/{PROCESS_FILE}"):
        left_behind.unlink()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: Any) -> None:
        stop_requested.set()
        signal_jobs(folder, signal.SIGTERM if number == signal.SIGHUP else number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def signal_jobs(folder: Path, number: int) -> None:
    """Send a signal to every job that runs on this machine, whichever launcher started it."""
    for path in folder.glob(f"*/{PROCESS_FILE}"):
        with contextlib.suppress(OSError, UserError, ProcessLookupError):
            process = read_json(path)
            if process["host"] == socket.gethostname():
                os.kill(process["pid"], number)
