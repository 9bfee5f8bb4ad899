"""How many bytes a piece of work allocated at most: counted on the allocator's events, never on the process.

On CUDA the allocator keeps the count itself. On the CPU torch's profiler records every allocation, temporaries inside
operations included, at some ten percent of time while it looks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from laddpo.processes.ranks import is_sharded

ALLOCATION = "[memory]"  # the profiler's name for one allocation (bytes > 0) or release (bytes < 0)


@dataclass
class PeakBytes:
    """`above`: the most bytes allocated at one time beyond what was there before; set when the block ends."""

    above: int = 0


@contextlib.contextmanager
def peak_bytes(device: torch.device | str) -> Iterator[PeakBytes]:
    """Measure what runs inside the block. On the CPU, what was there before and is freed inside is not subtracted."""
    peak = PeakBytes()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        torch.cuda.synchronize()
        peak.above = torch.cuda.max_memory_allocated() - before
        return
    with _quiet_profiler(), profile(profile_memory=True) as record:
        yield peak
    events = (event for event in record.kineto_results.events() if event.name() == ALLOCATION)
    live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak.above = max(peak.above, live)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors; a storage that several share counts once."""
    own = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in own}
    return sum(storages.values())


def bytes_before(
    device: torch.device | str, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """What is allocated now: on CUDA all of it, on the CPU what model and optimizer hold."""
    return torch.cuda.memory_allocated() if torch.device(device).type == "cuda" else resident_bytes(model, optimizer)


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of weights, gradients, buffers and optimizer state, wherever they are."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():  # 4-bit weights keep their scales beside the data
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor)]
            state = state.state2
    for state in optimizer.state.values() if optimizer else ():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return stored_bytes(tensors)


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler's library announces every start on stderr, at a level that only this variable turns off."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
