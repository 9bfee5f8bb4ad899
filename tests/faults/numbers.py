"""Numbers that go wrong and memory that runs out, at a chosen step of a training run."""

from __future__ import annotations

import math


def install(fault: dict) -> None:
    """`fault`: {"kind": loss | gradient | weight | memory, "calls": which gradient calls of this process, from 0}."""
    import torch

    from laddpo.core import tasks

    real, calls = tasks.accumulate_gradient, iter(range(10**6))

    def accumulate_gradient(denoiser, parameters, *args, **kwargs):
        is_faulty = next(calls) in fault["calls"]
        if is_faulty and fault["kind"] == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        kept = parameters[0].detach().clone()
        if is_faulty and fault["kind"] == "loss":
            parameters[0].data.fill_(math.nan)
        values = real(denoiser, parameters, *args, **kwargs)
        parameters[0].data.copy_(kept)
        if is_faulty and fault["kind"] == "gradient":
            parameters[-1].grad[0, 0] = math.inf
        return values

    tasks.accumulate_gradient = accumulate_gradient
