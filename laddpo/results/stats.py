"""How sure a number is: intervals of proportions, standard errors of means, paired comparisons of two models.

Plain numpy. Per-item values go in (0 and 1 for exact match; 0, 1/2 and 1 for reward accuracy; real numbers for
margins), small frozen records come out. Whoever calls owns the randomness: resampling takes a numpy Generator.

Sources: Wilson (1927) for one proportion; Newcombe (1998), method 10, for the difference of paired proportions;
McNemar's test in its exact binomial form; Efron's percentile bootstrap of paired differences; Holm (1979) for several
comparisons at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

DRIFT = 0.1  # a change of the answers' length, or of the share that ends, by this much of it is pointed out
FEW_DIFFERENCES = 10  # of fewer items that differ resampling makes too much: four in one direction would be certain
RESAMPLED_VALUES_AT_ONCE = 1 << 22  # 32 MiB of float64 while resampling


@dataclass(frozen=True)
class Mean:
    """A mean over `items` values; `std_error` is NaN below two items (or two groups), where it cannot be known."""

    mean: float
    std_error: float
    items: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The normal interval around the mean."""
        reach = normal_quantile(confidence) * self.std_error
        return self.mean - reach, self.mean + reach


@dataclass(frozen=True)
class Difference:
    """Mean of (tuned - base) over `items` paired items with the bounds of its interval. `degrees` of freedom of the
    Student's t that the interval was made with; 0: none was."""

    difference: float
    low: float
    high: float
    items: int
    degrees: int = 0

    def p_above(self, limit: float = 0.0) -> float:
        """p of the one-sided test that the truth lies above `limit`: small where it does.

        By Student's t, or the normal law, with the standard error that a 95% interval of this width means. The
        two-sided p is twice the smaller one of this and 1 - this.
        """
        reach = (self.high - self.low) / 2
        if not reach:
            return 0.5 if self.difference == limit else float(self.difference < limit)
        quantile = student_quantile(self.degrees) if self.degrees else normal_quantile(0.95)
        distance = (self.difference - limit) / reach * quantile
        return student_tail(distance, self.degrees) if self.degrees else 1 - NormalDist().cdf(distance)


def normal_quantile(confidence: float) -> float:
    """How many standard deviations hold `confidence` of a normal distribution: 1.96 for 0.95."""
    assert 0 < confidence < 1, f"confidence is {confidence}, expected a number between 0 and 1"
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson_interval(successes: float, items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion; right near 0 and 1 too, where `p +- z sqrt(pq/n)` shrinks to a point.

    `successes` may be fractional (ties counted one half): the interval is then slightly wide, never too narrow.
    10 of 10 at 95% gives (0.722, 1). No items: (0, 1), nothing is known.
    """
    assert 0 <= successes <= items, f"{successes} successes of {items} items"
    if items == 0:
        return 0.0, 1.0
    z, p = normal_quantile(confidence), successes / items
    centre = p + z * z / (2 * items)
    reach = z * math.sqrt(p * (1 - p) / items + z * z / (4 * items * items))
    scale = 1 + z * z / items
    low = 0.0 if successes == 0 else (centre - reach) / scale
    high = 1.0 if successes == items else (centre + reach) / scale
    return low, high


def mean_with_error(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Mean:
    """Mean of `values` with its standard error.

    `groups` names what belongs together (pairs of one prompt, one item under several seeds): the error is then that of
    a mean over clusters, wider when members of a group agree. Without it every value counts as independent.
    """
    x = _finite(values)
    if groups is None:
        error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    else:
        sums = _group_sums(x - x.mean(), groups)  # [groups]
        g = len(sums)
        error = math.sqrt(g / (g - 1) * float(sums @ sums)) / len(x) if g > 1 else math.nan
    return Mean(float(x.mean()), float(error), len(x))


def paired_bootstrap(
    base: Sequence[float],
    tuned: Sequence[float],
    rng: np.random.Generator,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Percentile interval of mean(tuned - base), resampling items (or whole groups) with replacement.

    `base[i]` and `tuned[i]` are the two models' values on the same item, so the item's difficulty cancels. Equal
    generators give equal intervals. Differences that are all equal give a point, which is no interval: see `compare`.
    """
    assert len(base) == len(tuned), f"{len(base)} base values for {len(tuned)} tuned values: pair them by item"
    d = _finite(tuned) - _finite(base)
    if groups is None:
        sums, sizes = d, np.ones(len(d))
    else:
        sums, sizes = _group_sums(d, groups), _group_sums(np.ones(len(d)), groups)
    count = len(sums)
    means = np.empty(resamples)
    chunk = max(1, RESAMPLED_VALUES_AT_ONCE // count)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        picked = rng.integers(0, count, size=(rows, count))  # [resamples, groups]
        means[start : start + rows] = sums[picked].sum(1) / sizes[picked].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(d.mean()), float(low), float(high), len(d))


def difference_over_seeds(runs: Sequence[Mapping[Hashable, float]]) -> Difference:
    """Mean difference of whole runs, with the interval in which both other seeds and other items are counted.

    `runs`: for each seed, the difference of each item. Student's t with one degree of freedom less than there are
    seeds, on the variance between seeds; where all seeds have the same items, that between items is added (two-way
    clusters: Cameron, Gelbach and Miller 2011, eq. 2.3), with Satterthwaite's degrees of freedom. At least two seeds.
    """
    means = np.array([np.mean(list(run.values())) for run in runs])
    seeds, variance = len(runs), means.var(ddof=1) / len(runs)
    items, degrees = list(runs[0]), len(runs) - 1
    if len(items) > 1 and all(run.keys() == runs[0].keys() for run in runs):
        d = np.array([[run[item] for item in items] for run in runs])  # [seeds, items]
        by_item = d.mean(axis=0).var(ddof=1) / len(items)
        rest = d - d.mean(axis=0) - means[:, None] + d.mean()
        both = (rest**2).sum() / ((seeds - 1) * (len(items) - 1)) / d.size  # counted in either of the others
        parts, variance = (variance, by_item), max(variance + by_item - both, variance, by_item)
        if variance:
            degrees = int(variance**2 / (parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / (len(items) - 1)))
    degrees = max(degrees, seeds - 1)
    mean, reach = float(means.mean()), student_quantile(degrees) * math.sqrt(variance)
    return Difference(mean, mean - reach, mean + reach, sum(map(len, runs)), degrees)


def student_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t: 12.71 for one degree of freedom, 1.96 for many. By bisection."""
    low, high = 1.0, 16.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, degrees) > 0.025 else (low, middle)
    return (low + high) / 2


def student_tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    assert degrees >= 1, f"{degrees} degrees of freedom"
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine, odd = math.sin(angle), math.cos(angle), degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, degrees + 1, 2):  # each term of the series from the one before
        total, term = total + term, term * cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 - inside) / 2 if t >= 0 else (1 + inside) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """p of several tests, so that below a is right for all of them together with probability 1 - a (Holm 1979).

    The smallest is multiplied by their number, the next by one less, and none falls below one before it. Worked
    example: 0.01, 0.04, 0.03 -> 0.03, 0.06, 0.06.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mcnemar_exact(base: Sequence[bool], tuned: Sequence[bool]) -> float:
    """Two-sided p-value that base and tuned are right equally often, from the items on which they disagree.

    Under equality each disagreement falls either way with probability 1/2, so the count is Binomial(n, 1/2).
    Worked example: 1 item lost, 7 gained: 2 * (1 + 8) / 2^8 = 0.0703.
    """
    gained, lost = _disagreements(base, tuned)
    n, k = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float(2 * tail / 2**n))  # exact integers: no overflow of floats at any n


def paired_shares(
    base: Sequence[bool], tuned: Sequence[bool], rng: np.random.Generator, *, groups: Sequence[Hashable] | None = None
) -> Difference:
    """As `paired_bootstrap`, of outcomes that are right or wrong, and never a point.

    Where fewer than FEW_DIFFERENCES items (or groups) differ, or all do alike, the interval is Newcombe's for as many
    outcomes as there are groups.
    """
    d = _finite(tuned) - _finite(base)
    differing = np.count_nonzero(d if groups is None else _group_sums(d, groups))
    if differing >= FEW_DIFFERENCES and _has_spread(d, groups):
        return paired_bootstrap(base, tuned, rng, groups=groups)
    low, high = newcombe_interval(base, tuned, independent=_independent(base, groups))
    return Difference(float(d.mean()), low, high, len(d))


def newcombe_interval(
    base: Sequence[bool], tuned: Sequence[bool], confidence: float = 0.95, independent: int | None = None
) -> tuple[float, float]:
    """Interval of the difference of two paired proportions, without resampling, never a point.

    Newcombe (1998), method 10: the Wilson bounds of both proportions are combined with their correlation phi. Use it
    where items are few or outcomes nearly all equal. `independent`: how many items they are worth, where some belong
    together (default: all).
    """
    a, b = np.asarray(base, dtype=bool), np.asarray(tuned, dtype=bool)
    n = len(a) if independent is None else independent
    worth = n / len(a)
    gained, lost = (count * worth for count in _disagreements(a, b))
    both, neither = int((a & b).sum()) * worth, int((~a & ~b).sum()) * worth
    right_base, right_tuned = min(both + lost, n), min(both + gained, n)  # rounding may pass n
    p_base, p_tuned = right_base / n, right_tuned / n
    low_base, high_base = wilson_interval(right_base, n, confidence)
    low_tuned, high_tuned = wilson_interval(right_tuned, n, confidence)
    product = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    numerator = both * neither - gained * lost
    if numerator > 0:  # continuity correction of phi, as in the paper
        numerator = max(numerator - n / 2, 0.0)
    phi = numerator / math.sqrt(product) if product else 0.0
    difference = p_tuned - p_base

    def reach(towards_tuned: float, towards_base: float) -> float:
        return math.sqrt(max(0.0, towards_tuned**2 - 2 * phi * towards_tuned * towards_base + towards_base**2))

    return (
        difference - reach(p_tuned - low_tuned, high_base - p_base),
        difference + reach(high_tuned - p_tuned, p_base - low_base),
    )


def compare(
    base: Sequence[float],
    tuned: Sequence[float],
    rng: np.random.Generator,
    groups: Sequence[Hashable] | None = None,
    *,
    is_share: bool,
    is_base_known: bool = False,
) -> dict[str, Any]:
    """The entry of results.json for one metric: both means, their difference, 95% intervals, number of items.

    `is_share`: every value is an outcome from 0 (wrong) to 1 (right), not a number of another kind. `is_base_known`:
    the base's values follow from what is compared (a reference's margin over itself is 0) and are not measured.

    Independent outcomes that are all 0 or 1 get Wilson's intervals and McNemar's p-value. Everything else (ties
    counted one half, margins, grouped items) gets normal intervals from its own standard error. Where fewer than
    FEW_DIFFERENCES outcomes differ, the interval is Newcombe's. Where the items show no spread, which is no proof that
    there is none, that of a share is Wilson's around a known base, and a number's is None: not known.
    """
    is_binary = is_share and groups is None and set(np.unique(base)) | set(np.unique(tuned)) <= {0, 1}
    change = (paired_shares if is_binary else paired_bootstrap)(base, tuned, rng, groups=groups)
    interval: list[float] | None = [change.low, change.high]
    tuned_interval = _interval(tuned, groups, is_share, is_binary)
    if not is_binary and not _has_spread(_finite(tuned) - _finite(base), groups):
        is_bounded = is_share and is_base_known and tuned_interval is not None
        interval = [bound - float(base[0]) for bound in tuned_interval] if is_bounded else None
    entry: dict[str, Any] = {
        "base": float(np.mean(base)),
        "tuned": float(np.mean(tuned)),
        "difference": change.difference,
        "interval": interval,
        "items": change.items,
        "base_interval": [float(base[0])] * 2 if is_base_known else _interval(base, groups, is_share, is_binary),
        "tuned_interval": tuned_interval,
    }
    if is_binary:
        entry["mcnemar_p"] = mcnemar_exact(base, tuned)
    return entry


def _interval(
    values: Sequence[float], groups: Sequence[Hashable] | None, is_share: bool, is_binary: bool
) -> list[float] | None:
    """The 95% interval of one model's mean, or None where one item (or group), or equal ones, cannot tell."""
    x = _finite(values)
    if is_binary:
        return list(wilson_interval(float(x.sum()), len(x)))
    if not _has_spread(x, groups):
        independent = _independent(x, groups)
        return list(wilson_interval(float(x.mean()) * independent, independent)) if is_share else None
    low, high = mean_with_error(x, groups).interval()
    return [max(low, 0.0), min(high, 1.0)] if is_share else [low, high]


def _has_spread(x: np.ndarray, groups: Sequence[Hashable] | None) -> bool:
    """Whether the values (the means of groups) differ by more than rounding; one alone does not."""
    means = x if groups is None else _group_sums(x, groups) / _group_sums(np.ones(len(x)), groups)
    return float(np.ptp(means)) > 1e-12 * float(np.abs(x).max())


def _independent(values: Sequence[float], groups: Sequence[Hashable] | None) -> int:
    return len(values) if groups is None else len(set(groups))


def _finite(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    assert x.ndim == 1 and len(x), f"expected a non-empty list of numbers, found shape {x.shape}"
    assert np.isfinite(x).all(), f"{int((~np.isfinite(x)).sum())} of {len(x)} values are not finite"
    return x


def _group_sums(x: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """Sum of `x` per group, in order of first appearance: [groups]."""
    assert len(groups) == len(x), f"{len(groups)} group names for {len(x)} values"
    row_of: dict[Hashable, int] = {}
    rows = [row_of.setdefault(group, len(row_of)) for group in groups]
    return np.bincount(rows, weights=x, minlength=len(row_of))


def _disagreements(base: Sequence[bool], tuned: Sequence[bool]) -> tuple[int, int]:
    """(items only tuned got right, items only base got right)."""
    a, b = np.asarray(base, dtype=bool), np.asarray(tuned, dtype=bool)
    assert a.shape == b.shape and a.size, f"expected two equally long lists, found {a.shape} and {b.shape}"
    return int((b & ~a).sum()), int((a & ~b).sum())
