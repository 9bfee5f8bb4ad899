"""The sampler's fast paths against the plain one: time on the same questions, interleaved, and the answers themselves.

Plain is the public sampler: a fixed number of steps for every answer, everything computed anew in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from laddpo.evaluation.sampling import SamplerSettings, until_stop

PLAIN = "plain"
Answer = Callable[[Sequence[int], SamplerSettings], list[np.ndarray]]


@dataclass(frozen=True)
class Decoded:
    """`seconds` [rounds]; `answers`: one array of ids per question, `tokens`: those before and with the stop token."""

    seconds: np.ndarray
    answers: list[np.ndarray]
    tokens: int


def ways(settings: SamplerSettings, batch: int) -> dict[str, SamplerSettings]:
    """What is compared, by name: each adds one thing to the one before; then the plain way, one question at a time."""
    plain = replace(settings, confidence_threshold=None, stop_early=False, block_cache="none", batch_size=batch)
    stopping = replace(plain, stop_early=True)
    threshold = replace(stopping, confidence_threshold=0.9)
    return {
        PLAIN: plain,
        "stop early": stopping,
        "+ threshold 0.9": threshold,
        "+ prefix cache": replace(threshold, block_cache="prefix"),
        "+ dual cache": replace(threshold, block_cache="dual"),
        "plain, one at a time": replace(plain, batch_size=1),
    }


def decode(
    answer: Answer, questions: int, wanted: Mapping[str, SamplerSettings], batch: int, stops: Sequence[int]
) -> dict[str, Decoded]:
    """Every way answers every question; a round is one batch of questions, answered by all ways in rotating order.

    One untimed answer of each comes first.
    """
    names = list(wanted)
    for name in names:
        answer([0], wanted[name])
    answers: dict[str, list[np.ndarray]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number, start in enumerate(range(0, questions, batch)):
        picked = range(start, min(start + batch, questions))
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            started = time.perf_counter()
            answers[name] += answer(picked, wanted[name])
            seconds[name].append(time.perf_counter() - started)
    return {
        name: Decoded(
            np.array(seconds[name]),
            answers[name],
            sum(min(len(until_stop(ids, stops)) + 1, len(ids)) for ids in answers[name]),
        )
        for name in names
    }
