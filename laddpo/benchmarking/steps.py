"""Work under a cap on memory: whether it runs, how much it takes, and for how long.

A cap stands in for a smaller card: CUDA's allocator refuses what would exceed it. Counted are tensors and what the
allocator took for them, weights included; the context of CUDA, some 0.5 GiB, is extra. A CPU knows no cap.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from laddpo.core.budget import TokenBudget, is_out_of_memory, release_memory
from laddpo.errors import RunFault
from laddpo.hardware.measuring import peak_bytes, resident_bytes
from laddpo.hardware.memory import GIB

OUT_OF_MEMORY = "out of memory"
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """`allocated`, `reserved` (CUDA alone): bytes at most. `seconds`: of each timed time. `problem`: why it did not
    run; nothing else is known then."""

    allocated: int | None = None
    reserved: int | None = None
    seconds: tuple[float, ...] = ()
    problem: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def fixed_budget(tokens: int) -> TokenBudget:
    """A budget that is not made smaller when memory runs out: what ran is what was asked for."""
    return TokenBudget(tokens, explain=lambda longest: OUT_OF_MEMORY, may_retry=False)


@contextlib.contextmanager
def capped(device: torch.device, gib: float | None) -> Iterator[None]:
    """Inside the block no more than `gib` can be taken on a CUDA device."""
    if device.type != "cuda" or gib is None:
        yield
        return
    release_memory()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure(work: Callable[[], object], model, device: torch.device, times: int, gib: float | None = None) -> Measured:
    """Do the work once to warm up and then `times` times, under a cap of `gib`."""
    with capped(device, gib):
        found = unless_out_of_memory(lambda: _measure(work, model, device, times), model)
    return Measured(problem=OUT_OF_MEMORY) if found is None else found


def unless_out_of_memory(work: Callable[[], T], model) -> T | None:
    """What the work gives; None where memory runs out, and then all that it held is given back."""
    try:
        return work()
    except Exception as error:
        if not (is_out_of_memory(error) or (isinstance(error, RunFault) and OUT_OF_MEMORY in str(error))):
            raise
    # outside the handler, whose traceback holds the tensors
    model.zero_grad(set_to_none=True)
    release_memory()
    return None


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one time, to the end of what it started on the device."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(work: Callable[[], object], model, device: torch.device, times: int) -> Measured:
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        seconds = tuple(timed(work, device) for _ in range(times))
        return Measured(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), seconds)
    resident = resident_bytes(model)
    with peak_bytes(device) as peak:
        work()
    return Measured(resident + peak.above, None, tuple(timed(work, device) for _ in range(times)))
