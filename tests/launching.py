"""Starting several processes as a user would: by torch.distributed.run, on gloo, on a free port, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def command(processes: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This package on the path, one thread for each process, no rank of our own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**kept, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *paths]), "OMP_NUM_THREADS": "1", **more}


def launch(processes: int, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess:
    """Run to the end; what both streams said is in `stdout`."""
    return subprocess.run(
        command(processes, *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
