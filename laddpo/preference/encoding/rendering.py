"""Renders chat templates in one process of its own (render_worker.py), which a template that never ends cannot hold up.

`render_jobs` gives for each job its text, or a `Failure` with the line of the template. The process is started when it
is first needed, is shared by all templates, and is started again after a template has ended it.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laddpo.preference.encoding.render_worker import READ_VARIABLES, characters

SECONDS = 5.0  # of processor time for one rendering
STALLED_SECONDS = 20.0  # until a rendering that cannot be interrupted ends the process
REQUEST_CHARACTERS = 2**22  # of one request, unless a single job has more

# messages, whether an open assistant turn is wanted at the end, and perhaps what the template is given beside them
Job = tuple[list[dict[str, Any]], bool] | tuple[list[dict[str, Any]], bool, dict[str, Any]]


@dataclass(frozen=True)
class Failure:
    """What a template did instead of rendering. `is_over`: it reached a limit of time, length or memory."""

    problem: str
    line: int | None = None
    is_over: bool = False


def render_jobs(template: str, variables: Mapping[str, Any], jobs: Sequence[Job]) -> list[str | Failure]:
    """The text of each job, or why there is none."""
    return [found for part in parts(jobs) for found in _PROCESS.render(template, variables, part)]


def read_variables(template: str) -> list[str] | Failure:
    """The names of the variables that a template reads and does not set itself, sorted."""
    (found,) = render_jobs(template, {}, [(READ_VARIABLES, False)])
    return found if isinstance(found, Failure) else json.loads(found)


def parts(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The jobs in requests of a bounded size, so that the process needs little memory."""
    part: list[Job] = []
    size = 0
    for job in jobs:
        length = characters(*job)
        if part and size + length > REQUEST_CHARACTERS:
            yield part
            part, size = [], 0
        part.append(job)
        size += length
    if part:
        yield part


class RenderProcess:
    """The process and its pipes; every thread may call `render`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner: int | None = None  # a process forked off us starts one of its own

    def render(self, template: str, variables: Mapping[str, Any], jobs: list[Job]) -> list[str | Failure]:
        with self._lock:
            limits = {"seconds": SECONDS, "stalled": STALLED_SECONDS}
            answers = self._ask({"template": template, "variables": dict(variables), "jobs": jobs, **limits})
        if answers is None and len(jobs) > 1:  # one of them ended the process: find out which
            return [found for job in jobs for found in self.render(template, variables, [job])]
        if answers is None:
            return [Failure("it ends or stalls the process that renders it", is_over=True)]
        return [
            answer["text"] if "text" in answer else Failure(answer["problem"], answer["line"], answer["over"])
            for answer in answers
        ]

    def _ask(self, request: dict) -> list[dict] | None:
        """The answers; None when the process ended instead."""
        process = self._running()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # an answer half read would be taken for the next one's
            self._end()
            raise
        if not line.endswith(b"\n"):
            self._end()
            return None
        return json.loads(line)

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            start = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", start, str(Path(__file__).with_name("render_worker.py")), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=os.sep,  # a disk that this process works on can be unmounted when it has ended
            )
            self._owner = os.getpid()
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def close(self) -> None:
        """End the process, if there is one."""
        self._end()


_PROCESS = RenderProcess()
atexit.register(_PROCESS.close)
