"""Measurements: peak bytes of a step, seconds of a step, and what follows from them; plain records out.

Bytes are counted on allocations above the policy's own weights: a rival's reference copy counts, as do gradients.
Seconds are taken interleaved: every contender once on the same pairs, in rotating order, then the next pairs. Ratios
are formed per round, so that a machine that slows down for a while slows all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from laddpo.benchmarking.contenders import Contender, Ours
from laddpo.benchmarking.steps import unless_out_of_memory, wait
from laddpo.core.gradient import score_items
from laddpo.hardware.measuring import peak_bytes, resident_bytes
from laddpo.hardware.memory import Load, Setup, predict_memory
from laddpo.preference.encoding.encode import EncodedPair

RESAMPLES = 10_000


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
    if isinstance(contender, Ours):
        contender.prepare(pairs, draws)
    _clear(model)
    device = model.get_output_embeddings().weight.device
    resident = resident_bytes(model)
    with peak_bytes(device) as peak:
        contender.step(pairs, draws)
    _clear(model)
    above = peak.above + contender.extra_bytes
    return Peak(contender.name, draws, above, above + resident)


def pass_peaks(ours: Ours, pairs: Sequence[EncodedPair], draws: int) -> dict[str, int]:
    """Peak bytes of our three passes: the policy's gradient, a margin without a graph, the reference."""
    items = ours.items(pairs, draws)
    ours.stored[ours.key(pairs, draws)] = np.zeros((len(pairs), 2, draws))  # no byte depends on these values
    work: dict[str, Callable[[], object]] = {
        "policy": lambda: ours.step(pairs, draws),
        "margin": lambda: score_items(ours.denoiser, items, ours.token_budget),
        "reference": lambda: ours.reference(items),
    }
    peaks = {}
    for name, run in work.items():
        _clear(ours.model)
        with peak_bytes(ours.denoiser.device) as peak:
            run()
        peaks[name] = peak.above
    _clear(ours.model)
    return peaks


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
    if isinstance(contender, Ours):
        contender.prepare(pairs, draws)
    _clear(model)
    device = model.get_output_embeddings().weight.device
    wait(device)
    started, started_cpu = time.perf_counter(), time.process_time()
    contender.step(pairs, draws)
    wait(device)
    return time.perf_counter() - started, time.process_time() - started_cpu


def _clear(model) -> None:
    for parameter in model.parameters():
        parameter.grad = None
