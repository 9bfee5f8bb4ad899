"""Measurements: peak bytes and seconds of a step, under a cap on memory or without; plain records out.

Bytes are counted on allocations above the policy's own weights: a rival's reference copy counts, as do gradients.
Seconds are taken interleaved: every contender once on the same pairs, in rotating order, then the next pairs. Ratios
are formed per round, so that a machine that slows down for a while slows all.

A cap simulates a smaller card: CUDA's allocator refuses what would exceed it. Counted are tensors and what the
allocator took for them, weights included; the context of CUDA, some 0.5 GiB, is extra. A CPU knows no cap.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from laddpo.benchmarking.contenders import OUT_OF_MEMORY, Contender, Ours
from laddpo.core.budget import is_out_of_memory, release_memory
from laddpo.core.gradient import score_items
from laddpo.errors import RunFault
from laddpo.hardware.measuring import peak_bytes, resident_bytes
from laddpo.hardware.memory import GIB, Load, Setup, predict_memory
from laddpo.preference.encoding.encode import EncodedPair

RESAMPLES = 10_000
T = TypeVar("T")


@dataclass(frozen=True)
class Peak:
    """`above`: bytes beyond the policy's weights at the peak of one step; `total`: with them."""

    contender: str
    draws: int
    above: int
    total: int


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of other / ours, with its 95% bootstrap interval."""

    median: float
    low: float
    high: float
    rounds: int


def step_peak(contender: Contender, model, pairs: Sequence[EncodedPair], draws: int) -> Peak:
    """The peak of one step that starts without gradients."""
    contender.prepare(pairs, draws)
    above = _peak(model, lambda: contender.step(pairs, draws)) + contender.extra_bytes
    return Peak(contender.name, draws, above, above + resident_bytes(model))


def pass_peaks(ours: Ours, pairs: Sequence[EncodedPair], draws: int) -> dict[str, int]:
    """Peak bytes of our three passes: the policy's gradient, a margin without a graph, the reference."""
    items = ours.items(pairs, draws)
    ours.stored[ours.key(pairs, draws)] = np.zeros((len(pairs), 2, draws))  # no byte depends on these values
    return {
        "policy": _peak(ours.model, lambda: ours.step(pairs, draws)),
        "margin": _peak(ours.model, lambda: score_items(ours.denoiser, items, ours.token_budget)),
        "reference": _peak(ours.model, lambda: ours.reference(items)),
    }


def _peak(model, work: Callable[[], object]) -> int:
    """Bytes at most above those that were there; without gradients before and after."""
    model.zero_grad(set_to_none=True)
    with peak_bytes(model.head_weight.device) as peak:
        work()
    model.zero_grad(set_to_none=True)
    return peak.above


def predicted_and_measured(ours: Ours, setup: Setup, pair: EncodedPair, draws: int) -> tuple[int, int, int]:
    """(tokens, predicted, measured) peak bytes of a step in which all draws of one pair are one micro-step.

    Weights included; the optimizer is not, which holds nothing before its first step.
    """
    (item,) = ours.items([pair], draws)
    masked = sum(len(sequence.draw.masked) for sequence in item.sequences)
    mixed = len({sequence.tokens for sequence in item.sequences}) > 1
    predicted = predict_memory(setup, Load(item.tokens, masked, mixed, exceeds=False))
    whole = replace(ours, token_budget=item.tokens)
    return item.tokens, predicted.peak - predicted.parts["optimizer"], step_peak(whole, ours.model, [pair], draws).total


def timed_rounds(
    contenders: Sequence[Contender], model, batches: Sequence[Sequence[EncodedPair]], draws: int
) -> dict[str, np.ndarray]:
    """Seconds of every contender on every batch, and of the processor under `<name>/cpu`. # float64 [batches] each

    One untimed step of each comes first. Who runs out of memory on any batch is left out.
    """

    def step(contender: Contender, pairs: Sequence[EncodedPair]) -> tuple[float, float] | None:
        return unless_out_of_memory(lambda: _timed_step(contender, model, pairs, draws), model)

    racing = [contender for contender in contenders if step(contender, batches[0][:1])]
    seconds = {contender.name: np.zeros((len(batches), 2)) for contender in racing}
    for number, batch in enumerate(batches):
        start = number % max(1, len(racing))
        for contender in [*racing[start:], *racing[:start]]:
            found = step(contender, batch)
            if found is None:
                racing.remove(contender)
            else:
                seconds[contender.name][number] = found
    walls = {contender.name: seconds[contender.name][:, 0] for contender in racing}
    return {**walls, **{f"{contender.name}/cpu": seconds[contender.name][:, 1] for contender in racing}}


def median_ratio(other: np.ndarray, ours: np.ndarray, rng: np.random.Generator) -> Ratio:
    """The median over rounds of other / ours, rounds resampled for the interval."""
    ratios = other / ours
    picked = rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[picked], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def _timed_step(contender: Contender, model, pairs: Sequence[EncodedPair], draws: int) -> tuple[float, float]:
    contender.prepare(pairs, draws)
    model.zero_grad(set_to_none=True)
    return timed(lambda: contender.step(pairs, draws), model.head_weight.device)


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


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one time, to the end of what it started on the device, and seconds of the processor."""
    wait(device)
    started, started_cpu = time.perf_counter(), time.process_time()
    work()
    wait(device)
    return time.perf_counter() - started, time.process_time() - started_cpu


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(work: Callable[[], object], model, device: torch.device, times: int) -> Measured:
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        seconds = tuple(timed(work, device)[0] for _ in range(times))
        return Measured(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), seconds)
    resident = resident_bytes(model)
    with peak_bytes(device) as peak:
        work()
    return Measured(resident + peak.above, None, tuple(timed(work, device)[0] for _ in range(times)))
