"""Several processes exchange something and end at once: run by torch.distributed.run, all on one core.

That is where gloo's threads are late: of three processes that take their interpreters down meanwhile about every second
aborts. Something refers to the group until the end, as sharded weights do.
"""

from __future__ import annotations

import atexit
import builtins
import os

import torch

from laddpo.cli.launch import leave
from laddpo.errors import EXIT_DONE
from laddpo.processes.ranks import connect

if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    ranks = connect("cpu")
    builtins.kept = torch.distributed.group.WORLD
    atexit.register(print, f"rank {ranks.rank} ends")
    for _ in range(200):
        torch.distributed.all_gather([torch.zeros(1) for _ in range(ranks.world)], torch.ones(1))
    leave(EXIT_DONE)
