"""Intervals of numbers that are measured on a sample of pairs, each of them several times.

Masks are drawn for each pair by itself, so the evaluations of a pair belong to it alone. A pair is therefore resampled
together with all its evaluations: what its own evaluations vary by is part of what pairs differ by. To resample
evaluations within pairs once more would count that noise twice.

The interval is the symmetric bootstrap-t (Hall 1988) of the logarithm, or of the logit of a share: resamples give the
spread of (statistic - value) / standard error, whose quantiles are wider than Student's where a few pairs hold most of
the noise. Plain percentiles are too narrow there (tests/evaluation/test_intervals.py simulates both).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
FEWEST = 0.8  # of the resamples must give a number, else there is no interval


@dataclass(frozen=True)
class Quantity:
    """A statistic of every resample [R] with the influence of each pair on it [R, P], to first order."""

    value: np.ndarray
    influence: np.ndarray

    def __add__(self, other: Quantity) -> Quantity:
        return Quantity(self.value + other.value, self.influence + other.influence)

    def __sub__(self, other: Quantity) -> Quantity:
        return self + other * -1.0

    def __mul__(self, factor: float) -> Quantity:
        return Quantity(self.value * factor, self.influence * factor)

    def __truediv__(self, other: Quantity) -> Quantity:
        ratio = self.value / other.value
        return Quantity(ratio, (self.influence - ratio[:, None] * other.influence) / other.value[:, None])


@dataclass(frozen=True)
class Sample:
    """How often each pair counts in each resample. # [R, P]"""

    counts: np.ndarray

    def mean(self, values: np.ndarray) -> Quantity:
        """The mean of a value of every pair. # values [P]"""
        mean = self.counts @ values / self.counts.sum(axis=1)
        return Quantity(mean, values - mean[:, None])

    def mean_product(self, products: np.ndarray) -> Quantity:
        """The mean over couples of DIFFERENT pairs, so that no pair's own noise is in it. # products [P, P]"""
        size = self.counts.sum(axis=1)
        rows = self.counts @ (products - np.diag(np.diag(products)))  # [R, P]
        mean = (rows * self.counts).sum(axis=1) / (size**2 - (self.counts**2).sum(axis=1))
        return Quantity(mean, 2 * (rows / (size[:, None] - self.counts) - mean[:, None]))


class Intervals:
    """Values and 95% intervals of statistics of one sample of pairs, all from the same resamples."""

    def __init__(self, pairs: int, rng: np.random.Generator, resamples: int = RESAMPLES):
        self.pairs = pairs
        self.once = Sample(np.ones((1, pairs)))
        self.again = Sample(rng.multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples).astype(float))

    def of(
        self, statistic: Callable[[Sample], Quantity], scale: str = "log", confidence: float = 0.95
    ) -> tuple[float | None, list[float] | None]:
        """The statistic of all pairs, and its interval. None for a value that is not there (a ratio to nothing), and
        for an interval that so few pairs cannot tell.

        `scale`: on which the interval is symmetric, a row of SCALES.
        """
        there, back = SCALES[scale]
        with np.errstate(all="ignore"):
            found, resampled = statistic(self.once), statistic(self.again)
            value = float(found.value[0])
            start, error = there(found), self._error(self.once, there(found))
            moved = there(resampled)
            t = np.abs(moved.value - start.value) / self._error(self.again, moved)
            t = t[np.isfinite(t)]
            if not np.isfinite(value):
                return None, None
            if self.pairs < 3 or len(t) < FEWEST * len(moved.value) or not np.isfinite(start.value[0]):
                return value, None
            reach = np.quantile(t, confidence) * error
            interval = [float(back(start.value[0] + sign * reach[0])) for sign in (-1, 1)]
            return value, interval if np.isfinite(interval).all() else None

    def _error(self, sample: Sample, quantity: Quantity) -> np.ndarray:
        """Standard error by the pairs' influences. # [R]"""
        return np.sqrt((sample.counts * quantity.influence**2).sum(axis=1) / (self.pairs * (self.pairs - 1)))


def _log(found: Quantity) -> Quantity:
    return Quantity(np.log(found.value), found.influence / found.value[:, None])


def _logit(found: Quantity) -> Quantity:
    rest = 1 - found.value
    return Quantity(np.log(found.value / rest), found.influence / (found.value * rest)[:, None])


SCALES: dict[str, tuple[Callable[[Quantity], Quantity], Callable[[float], float]]] = {
    "log": (_log, np.exp),  # of what is above 0
    "logit": (_logit, lambda y: 1 / (1 + np.exp(-y))),  # of what lies between 0 and 1
    "plain": (lambda found: found, lambda y: y),  # of what may have any sign
}
