"""Processes of jobs: the command of one, its output, and the signals that are passed on to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laddpo
from laddpo.errors import UserError
from laddpo.settings.of_a_run import AT_ONCE
from laddpo.storage.atomic import read_json, write_json
from laddpo.storage.locks import open_own

PROCESS_FILE = "process.json"


@dataclass(frozen=True)
class Sweep:
    """What all jobs have in common. `folder` holds one folder per job."""

    stage: str
    config_name: str
    config_dir: str | None
    overrides: list[str]
    folder: Path
    is_resumed: bool


def quoted(text: str) -> str:
    """A text as a quoted value of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def child_command(sweep: Sweep, overrides: Sequence[str], folder: Path) -> list[str]:
    """`python -m laddpo.<stage>` with a job's overrides and its own folder."""
    flags = ["--config-name", sweep.config_name]
    if sweep.config_dir is not None:
        flags += ["--config-dir", sweep.config_dir]
    own = [f"output_dir={quoted(str(folder))}", "hydra.mode=RUN"]
    if sweep.is_resumed and sweep.stage not in AT_ONCE:
        own.append("resume=true")
    return [sys.executable, "-m", f"laddpo.{sweep.stage}", *flags, *overrides, *own]


def run_child(command: list[str], folder: Path, log: Path | None = None) -> int:
    """The exit code of a job's process, whose number stands in the job's folder while it runs; `log` takes its output.

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
            output = open_own(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # added to as the job goes
            stack.callback(os.close, output)
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        write_json(folder / PROCESS_FILE, {"pid": child.pid, "host": socket.gethostname()})
        try:
            return child.wait()
        finally:
            (folder / PROCESS_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def forward_signals(folder: Path) -> Iterator[Callable[[], bool]]:
    """Within the block, signals to stop go to the running jobs, and no further job is started; what it gives
    tells whether there was one."""
    _stop_requested.clear()
    for left_behind in folder.glob(f"*/{PROCESS_FILE}"):
        left_behind.unlink()
    if threading.current_thread() is not threading.main_thread():
        yield _stop_requested.is_set
        return

    def forward(number: int, frame: Any) -> None:
        _stop_requested.set()
        signal_jobs(folder, signal.SIGTERM if number == signal.SIGHUP else number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield _stop_requested.is_set
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


class _SweepStopped(BaseException):
    """Ends the sweeper's own loop: Hydra catches every Exception of a job."""


_stop_requested = threading.Event()
