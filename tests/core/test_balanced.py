"""Masks in fours, and picks that favour differing tokens: exactly unbiased, and what they promise about each other."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laddpo.core.draws import (
    ESTIMATORS,
    ElboEstimator,
    MaskedDraw,
    MaskLaw,
    Response,
    count_law,
    mask_size,
    picked_token,
)
from laddpo.core.noise import COUNT_SCHEDULES, FULL, NoiseKey, golden_step
from laddpo.core.tasks import differing_positions, pair_item
from laddpo.preference.encoding.encode import EncodedPair
from tests.core import oracle
from tests.core.helpers import random_ids, tiny_denoiser

EXACT = 1e-12  # relative, float64
PROMPT = np.array([1, 4, 2], dtype=np.int32)
CELLS = 1 << 8  # of one word's range: finer than its breakpoints lie apart


class Words:
    """Takes the place of `NoiseKey.words`: every random word by its purpose."""

    def __init__(self, monkeypatch):
        self.of: dict[str, np.ndarray] = {}
        monkeypatch.setattr(NoiseKey, "words", lambda key, purpose, count: self.look_up(key, purpose, count))

    def look_up(self, key: NoiseKey, purpose: str, count: int) -> np.ndarray:
        words = np.asarray(self.of[purpose], dtype=np.uint64)
        assert len(words) == count, purpose
        return words


def pieces(value_of) -> list[tuple[int, int]]:
    """(a word, how many words) of every run of equal `value_of`, over all 2^64 words; exact by bisection."""
    found, todo = [], [(cell * FULL // CELLS, (cell + 1) * FULL // CELLS) for cell in range(CELLS)]
    while todo:
        low, high = todo.pop()
        if value_of(low) == value_of(high - 1):
            found.append((low, high - low))
        else:
            middle = (low + high) // 2
            todo += [(low, middle), (middle, high)]
    merged: dict = {}
    for low, count in found:
        word, total = merged.get(value_of(low), (low, 0))
        merged[value_of(low)] = (word, total + count)
    return list(merged.values())


def outcomes(
    words: Words, e: ElboEstimator, length: int, differing: np.ndarray
) -> list[list[tuple[float, MaskedDraw]]]:
    """For each of the first four draws: every draw with its probability.

    All orders, coins, picks, counts and crossings of picks.
    """
    response = Response("pair", "chosen", length, differing)
    crossings = range(max(1, length - 1))
    orders = list(itertools.permutations(range(length)))
    words.of = {"mask": np.arange(length), "pick-start": [0], "count-coin": [0], "other-pick": [0]}

    def picks(word: int) -> tuple:
        words.of["pick-start"] = [word]
        return tuple(picked_token(e, response, k) for k in range(4))

    def sizes(word: int) -> tuple:
        words.of["count-shift"] = [word]
        return tuple(len(e.draw("pair", "chosen", length, k, differing).masked) for k in range(4))

    found: list[dict[tuple, tuple[Fraction, MaskedDraw]]] = [{} for _ in range(4)]
    every = itertools.product(pieces(picks), pieces(sizes), crossings, (0, 1), orders)
    for (pick, picked), (count, counted), crossing, coin, order in every:
        words.of = {"pick-start": [pick], "count-shift": [count], "count-coin": [coin], "mask": np.argsort(order)}
        words.of["other-pick"] = [(crossing * FULL + FULL // 2) // len(crossings)]
        share = Fraction(picked * counted, FULL * FULL * len(orders) * 2 * len(crossings))
        for index in range(4):
            draw = e.draw("pair", "chosen", length, index, differing)
            key = (tuple(draw.masked), draw.weight)
            found[index][key] = (found[index][key][0] + share if key in found[index] else share, draw)
    assert all(sum(share for share, _ in law.values()) == 1 for law in found)
    return [[(float(share), draw) for share, draw in law.values()] for law in found]


CASES = [
    ("balanced", length, {"difference_focus": focus}, tuple(differing))
    for length in range(1, 4)
    for focus, differing in ((0.0, []), (0.5, [length - 1]), (0.75, range(max(1, length - 1))))
] + [
    ("count", 4, {"difference_focus": 0.5}, (0, 3)),
    ("count", 4, {"count_tilt": 1.0}, ()),
    ("complement", 3, {"difference_focus": 0.5}, (1,)),
    ("complement", 4, {"difference_focus": 0.75, "count_tilt": 0.3}, (0, 3)),
    ("balanced", 3, {"count_tilt": 0.5}, ()),
    ("balanced", 4, {"difference_focus": 0.75, "count_tilt": 0.5}, (1, 2)),
]


@pytest.mark.parametrize(("estimator", "length", "options", "differing"), CASES)
def test_every_single_draw_has_exactly_the_bound_as_its_mean(estimator, length, options, differing, monkeypatch):
    denoiser, response = tiny_denoiser(), random_ids(np.random.default_rng(3), length)
    e = ElboEstimator(estimator, "low_discrepancy", 8, **options)
    words = Words(monkeypatch)
    with torch.no_grad():
        bound = oracle.exact_bound(denoiser, PROMPT, response).item()
        laws = outcomes(words, e, length, np.array(differing, dtype=np.int64))
        for index, law in enumerate(laws):
            mean = oracle.exact_mean(denoiser, PROMPT, response, law).item()
            assert abs(mean - bound) < EXACT * abs(bound), f"draw {index}"


def test_the_check_fails_for_picks_without_their_weight(monkeypatch):
    """Favouring tokens while weighting as if none were favoured."""
    denoiser, response = tiny_denoiser(), random_ids(np.random.default_rng(3), 3)

    def unweighted(e, of, index):
        draw = ESTIMATORS["count"].draw(e, of, index)
        return MaskedDraw(index, draw.masked, of.length / len(draw.masked))

    monkeypatch.setitem(ESTIMATORS, "wrong", MaskLaw(unweighted))
    e = ElboEstimator("wrong", "low_discrepancy", 8, difference_focus=0.5)
    law = outcomes(Words(monkeypatch), e, 3, np.array([1]))[0]
    with torch.no_grad():
        bound = oracle.exact_bound(denoiser, PROMPT, response).item()
        assert abs(oracle.exact_mean(denoiser, PROMPT, response, law).item() - bound) > 1e-4 * abs(bound)


@pytest.mark.parametrize("schedule", COUNT_SCHEDULES)
@pytest.mark.parametrize("focus", [0.0, 0.8])
def test_means_over_many_pairs_lie_within_four_standard_errors(schedule, focus, log_sums_and_bound):
    """The real generator, over a whole step's draws."""
    log_sums, bound = log_sums_and_bound
    e = ElboEstimator("balanced", schedule, 4, seed=3, difference_focus=focus, count_tilt=focus / 2)
    differing = np.array([2, 4])
    draws = [[e.draw(f"{i}", "chosen", 5, k, differing) for k in range(4)] for i in range(400)]
    estimates = np.array([np.mean([d.weight * log_sums[tuple(d.masked)] for d in of_pair]) for of_pair in draws])
    assert abs(estimates.mean() - bound) < 4 * estimates.std(ddof=1) / len(estimates) ** 0.5


@pytest.fixture(scope="module")
def log_sums_and_bound():
    """The log-sum of every mask of a response of 5 tokens, and its exact bound."""
    denoiser, response = tiny_denoiser(), random_ids(np.random.default_rng(5), 5)
    with torch.no_grad():
        sums = {mask: oracle.log_sum(denoiser, PROMPT, response, mask).item() for mask in oracle.nonempty_masks(5)}
        return sums, oracle.exact_bound(denoiser, PROMPT, response).item()


# What four masks promise each other


@given(seed=st.integers(0, 2**64), length=st.integers(1, 40), quad=st.integers(0, 5), focus=st.sampled_from([0.0, 0.6]))
@settings(max_examples=200)
def test_four_masks_hide_every_token_twice_but_picked_ones_more_often(seed, length, quad, focus):
    e = ElboEstimator("balanced", seed=seed, difference_focus=focus)
    masks = [e.draw("pair", "chosen", length, 4 * quad + k, np.arange(length // 2)).masked for k in range(4)]
    times = np.bincount(np.concatenate(masks), minlength=length)
    picked = np.flatnonzero(times > 2)
    assert (times >= 2).all() and 1 <= len(picked) <= 2
    for pair in (masks[:2], masks[2:]):
        assert len(pair[0]) + len(pair[1]) == length + 1
        assert np.intersect1d(*pair).size >= 1  # the pick is hidden in both
    small = [min(pair, key=len) for pair in (masks[:2], masks[2:])]
    common = np.intersect1d(*small)
    assert set(common) <= set(picked), "the small masks share nothing but picks"


def test_two_tokens_are_not_always_hidden_together_as_with_inverses():
    """A mask and its inverse agree on whether two tokens are hidden alike; the large masks here are dealt out anew."""
    agree = []
    for i in range(400):
        e = ElboEstimator("balanced", seed=i)
        alike = [len({int(t in e.draw("p", "chosen", 30, k).masked) for t in (3, 17)}) == 1 for k in (0, 1)]
        agree.append(alike[0] == alike[1])
    assert 0.4 < np.mean(agree) < 0.9


@given(length=st.integers(1, 30), differing=st.sets(st.integers(0, 29), min_size=1), index=st.integers(0, 40))
def test_a_draw_always_hides_a_picked_token_and_weighs_at_most_one_over_its_floor(length, differing, index):
    positions = np.array(sorted(d for d in differing if d < length), dtype=np.int64)
    for estimator in ("count", "complement", "balanced"):
        draw = ElboEstimator(estimator, difference_focus=0.5).draw("pair", "chosen", length, index, positions)
        assert len(draw.masked) >= 1
        floor = 0.5 * len(draw.masked) / length
        assert draw.weight * (1 + 1e-12) >= 1 and draw.weight <= 1 / floor * (1 + 1e-12)


@given(length=st.integers(1, 60), tilt=st.floats(0.01, 1.0), place=st.integers(0, FULL - 1))
def test_the_count_at_a_place_of_its_law_is_the_one_whose_share_it_falls_in(length, tilt, place):
    _, law = count_law(length, tilt)
    assert law == pytest.approx(law[::-1]) and sum(law) == pytest.approx(1)
    e = ElboEstimator("count", count_tilt=tilt)
    size = mask_size(e, length, place)
    assert mask_size(e, length, FULL - 1 - place) == length + 1 - size
    assert sum(law[: size - 1]) - 1e-12 <= place / FULL <= sum(law[:size]) + 1e-12


def test_a_tilt_keeps_the_largest_weight_small():
    weights = {tilt: 1 / (count_law(256, tilt)[1][0]) for tilt in (0.0, 0.5)}
    assert weights[0.0] == pytest.approx(256) and weights[0.5] < 90


def test_picks_fall_on_differing_tokens_in_the_wanted_share():
    e = ElboEstimator("count", "iid", difference_focus=0.6)
    alone = [e.draw(f"{i}", "chosen", 10, k, np.array([2, 7])).masked for i in range(500) for k in range(4)]
    picked = [mask[0] for mask in alone if len(mask) == 1]
    share = np.isin(picked, [2, 7]).mean()
    assert abs(share - (0.6 + 0.4 * 0.2)) < 4 * (0.68 * 0.32 / len(picked)) ** 0.5


def test_golden_steps_leave_no_large_gap():
    for count in (2, 3, 5, 8, 13):
        points = sorted(golden_step(12345, k) / FULL for k in range(count))
        gaps = np.diff([*points, points[0] + 1])
        assert gaps.max() < 2.7 * gaps.min(), count


# Which tokens differ


@pytest.mark.parametrize(
    ("response", "other", "expected"),
    [
        ([1, 2, 3, 9], [1, 4, 3, 9], [1]),
        ([1, 2, 3, 2, 9], [1, 4, 3, 4, 9], [1, 3]),
        ([1, 2, 3, 9], [1, 4, 4, 3, 9], [1]),
        ([1, 4, 4, 3, 9], [1, 2, 3, 9], [1, 2]),
        ([1, 2, 9], [1, 2, 2, 9], []),
        ([1, 2, 2, 9], [1, 2, 9], [2]),
        ([5, 9], [5, 9], []),
        ([1, 2], [3, 4, 5], [0, 1]),
    ],
)
def test_differing_positions_are_what_is_left_of_common_beginning_and_end(response, other, expected):
    assert differing_positions(np.int32(response), np.int32(other)).tolist() == expected


@given(a=st.lists(st.integers(0, 2), min_size=1, max_size=8), b=st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_what_is_not_differing_is_equal_in_order(a, b):
    a, b = np.int32(a), np.int32(b)
    kept_a = np.delete(a, differing_positions(a, b))
    kept_b = np.delete(b, differing_positions(b, a))
    assert kept_a.tolist() == kept_b.tolist()


def test_a_pair_puts_its_own_differing_tokens_into_focus():
    pair = EncodedPair("p", PROMPT, np.int32([1, 2, 3, 4, 5, 6]), np.int32([1, 2, 3, 0, 5, 6]), group="p")
    item = pair_item(pair, ElboEstimator("balanced", difference_focus=0.9, diffusion_samples=64), range(64))
    plain = pair_item(pair, ElboEstimator("balanced", diffusion_samples=64), range(64))
    hidden, hidden_plain = (
        np.mean([3 in sequence.draw.masked for side in i.sides for sequence in side]) for i in (item, plain)
    )
    assert hidden > 0.9 > hidden_plain


@pytest.mark.parametrize(("moved", "low", "high"), [("shared", 2, 9), ("differing", 0, 0.5)])
def test_a_focus_loses_where_training_moves_the_shared_tokens_and_wins_where_it_moves_the_others(moved, low, high):
    """Responses of 20 tokens of which 4 differ; every moved token has gained one nat, in whatever context."""
    length, differing = 20, np.arange(4)
    gain = np.isin(np.arange(length), differing) == (moved == "differing")
    vrpo = ElboEstimator("count", "iid", shared_counts=False)
    focused = ElboEstimator("balanced", difference_focus=0.5)

    def variance(estimator: ElboEstimator) -> float:
        def ratio(seed: int, side: str) -> float:
            e = replace(estimator, seed=seed)
            draws = [e.draw("p", side, length, k, differing) for k in range(4)]
            return np.mean([draw.weight * gain[draw.masked].sum() for draw in draws])

        return float(np.var([ratio(seed, "chosen") - ratio(seed, "rejected") for seed in range(150)]))

    assert low < variance(focused) / variance(vrpo) < high
