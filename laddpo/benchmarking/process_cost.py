"""What a process takes: the processor time of it and of all that it started, and the largest memory of one of these.

Linux adds the memory of the parent to the peak of a new process. So a small process stands between: this file, run as a
script, without any import of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

POLL_SECONDS = 0.05


def process_cost(command: Sequence[str], until: Path | None = None) -> dict[str, float]:
    """{"seconds", "gib"} of the command. It gets SIGTERM once `until` is there, and must then end as one that was
    stopped. `RunFault` with its last words if it fails."""
    from laddpo.errors import EXIT_DONE, EXIT_STOPPED, RunFault

    with tempfile.TemporaryFile() as said:
        between = [sys.executable, "-I", "-S", __file__, str(until or ""), *command]
        process = subprocess.Popen(between, stdout=subprocess.PIPE, stderr=said, start_new_session=True)
        try:
            told = process.communicate()[0]
        except BaseException:  # also where the benchmark is stopped: the command is a child of the process between
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        found = json.loads(told) if told else {"code": process.returncode}
        if found["code"] != (EXIT_STOPPED if until else EXIT_DONE):
            said.seek(0)
            words = said.read()[-2000:].decode(errors="replace")
            raise RunFault(f"{' '.join(command)}\nended with {found['code']}: {words}")
    return {"seconds": found["seconds"], "gib": found["bytes"] / 2**30}


def measure(until: str, command: Sequence[str]) -> dict[str, float]:
    """Run the command, its output in our stderr: its exit code, seconds and bytes. It ends with the benchmark, also
    where that is killed or its terminal is closed."""
    benchmark, process, ended = os.getppid(), subprocess.Popen(command, stdout=sys.stderr), 0
    while not ended:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not ended:
            if os.getppid() != benchmark:
                os.killpg(0, signal.SIGKILL)  # this process, the command, and what it started
            if os.path.exists(until):
                os.kill(process.pid, signal.SIGTERM)
                until = ""
            time.sleep(POLL_SECONDS)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": usage.ru_utime + usage.ru_stime, "bytes": usage.ru_maxrss * unit}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
