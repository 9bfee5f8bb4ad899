"""Intervals over pairs and their evaluations: numbers derived by hand, and coverage by simulation."""

import numpy as np
import pytest

from laddpo.estimator_study.intervals import Intervals, Sample

PAIRS, EVALUATIONS, SIZE = 32, 4, 24
MEAN = np.eye(SIZE)[0] * 0.7


def test_a_mean_and_a_mean_of_products_are_those_of_the_pairs_and_leave_their_own_noise_out():
    sample, values = Sample(np.array([[1.0, 2.0, 1.0]])), np.array([1.0, 4.0, 3.0])
    mean = sample.mean(values)
    assert mean.value.tolist() == [3.0] and mean.influence.tolist() == [[-2.0, 1.0, 0.0]]
    # couples of different pairs: 1x2 twice, 1x3 once, 2x3 twice, each both ways
    products = np.outer(values, values) + np.diag([100.0, 200.0, 300.0])
    assert sample.mean_product(products).value[0] == pytest.approx((2 * 4 + 3 + 2 * 12) / 5)


def test_influences_are_derivatives_of_a_ratio_by_the_weights_of_pairs():
    rng = np.random.default_rng(0)
    values, base, vectors = rng.random(6) + 1, rng.random(6) + 1, rng.standard_normal((6, 3)) + 1
    products = vectors @ vectors.T

    def statistic(sample):
        return sample.mean(values) / (sample.mean(base) - sample.mean_product(products) * 0.1)

    found = statistic(Sample(np.ones((1, 6))))
    step = 1e-6
    for pair in range(6):
        weights = np.ones((1, 6)) + 6 * step * (np.eye(6)[pair] - 1 / 6)  # towards this pair alone
        slope = (statistic(Sample(weights)).value[0] - found.value[0]) / step
        assert slope == pytest.approx(found.influence[0, pair], rel=0.35, abs=0.2)  # couples lack the pair itself


def test_what_cannot_be_told_has_no_interval():
    two, many = (Intervals(pairs, np.random.default_rng(0)) for pairs in (2, 8))
    assert two.of(lambda s: s.mean(np.array([1.0, 3.0]))) == (2.0, None)
    assert many.of(lambda s: s.mean(np.ones(8)) / s.mean(np.zeros(8))) == (None, None)
    assert many.of(lambda s: s.mean(np.zeros(8))) == (0.0, None)
    value, (low, high) = many.of(lambda s: s.mean(np.arange(1.0, 9.0)))
    assert low < value == 4.5 < high


def population(pairs: int, tail: float, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far pairs lie from their mean, the standard deviation of their masks, and a factor of another way to draw.

    Log-normal. At a tail of 0.3 the variance of a pair's masks differs between pairs by as much as its mean, at 0.5 by
    2.6 times that.
    """
    far, own, factor = np.exp(rng.standard_normal((3, pairs)) * np.array([[tail], [tail], [0.5]]))
    return far, own * far, 0.4 * factor


def simulated(tail: float, rng) -> list[tuple[np.ndarray, ...]]:
    """(squared lengths, traces, products) of pairs under three ways to draw: usual, four times the noise, another."""
    far, noise, factor = population(PAIRS, tail, rng)
    centres = MEAN + far[:, None] * rng.standard_normal((PAIRS, SIZE)) / SIZE**0.5
    found = []
    for variance in (noise**2, 4 * noise**2, noise**2 * factor):
        spread = np.sqrt(variance / SIZE)[:, None, None] * rng.standard_normal((PAIRS, EVALUATIONS, SIZE))
        gradients = centres[:, None] + spread
        means = gradients.mean(axis=1)
        traces = gradients.var(axis=1, ddof=1).sum(axis=-1)
        found.append(((gradients**2).sum(axis=-1).mean(axis=1), traces, means @ means.T))
    return found


def statistics_of(found):
    """By name: the statistic as a page shows it, and the scale of its interval."""
    usual, noisy, other = found

    def total(sample, way):
        return sample.mean(way[0]) - sample.mean_product(way[2])

    return {
        "masks' share": (lambda s: s.mean(usual[1]) / total(s, usual), "logit"),
        "equal forwards": (lambda s: total(s, noisy) / total(s, usual) * 0.25, "log"),
        "ratio of masks": (lambda s: s.mean(other[1]) / s.mean(usual[1]), "log"),
        "signal over noise": (lambda s: s.mean_product(usual[2]) / total(s, usual), "plain"),
    }


def truths(tail: float) -> dict[str, float]:
    far, noise, factor = population(2_000_000, tail, np.random.default_rng(1))
    between, masks, other = (float(np.mean(x)) for x in (far**2, noise**2, noise**2 * factor))
    return {
        "masks' share": masks / (between + masks),
        "equal forwards": (between + 4 * masks) / (between + masks) / 4,
        "ratio of masks": other / masks,
        "signal over noise": float(MEAN @ MEAN) / (between + masks),
    }


@pytest.mark.parametrize(
    ("tail", "times", "low", "high"),
    [
        (0.3, 100, 0.86, 1.0),
        pytest.param(0.3, 1500, 0.92, 0.97, marks=pytest.mark.long),
        pytest.param(0.5, 1500, 0.87, 0.97, marks=pytest.mark.long),  # a few pairs hold most of the noise
    ],
)
def test_intervals_hold_the_truth_in_95_of_100_samples(tail, times, low, high):
    rng, known = np.random.default_rng(2), truths(tail)
    hits = dict.fromkeys(known, 0)
    for _ in range(times):
        intervals = Intervals(PAIRS, rng, resamples=300 if times < 1000 else 600)
        for name, (statistic, scale) in statistics_of(simulated(tail, rng)).items():
            interval = intervals.of(statistic, scale)[1]
            hits[name] += interval is not None and interval[0] <= known[name] <= interval[1]
    shares = {name: count / times for name, count in hits.items()}
    print(shares)
    assert all(low <= share <= high for share in shares.values()), shares
