"""Numbers that go wrong and memory that runs out, at a chosen step of a training run."""

from __future__ import annotations

import math


def install(fault: dict) -> None:
    """`fault`: {"kind": loss | gradient | memory, "calls": which steps of this process, from 0}."""
    import torch

    from laddpo.core.tasks import DpoTask

    real, calls = DpoTask.accumulate, iter(range(10**6))

    def accumulate(task, *args, **kwargs):
        is_faulty = next(calls) in fault["calls"]
        first, *_, last = task.parameters.values()
        if is_faulty and fault["kind"] == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        kept = first.detach().clone()
        if is_faulty and fault["kind"] == "loss":
            first.data.fill_(math.nan)
        metrics = real(task, *args, **kwargs)
        first.data.copy_(kept)
        if is_faulty and fault["kind"] == "gradient":
            last.grad[0, 0] = math.inf
        return metrics

    DpoTask.accumulate = accumulate
