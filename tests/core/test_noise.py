"""Noise is a function of identity: the same draw whatever surrounds it, uniform, and the same numbers for ever."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laddpo.core.draws import ESTIMATORS, ElboEstimator, Response
from laddpo.core.noise import COUNT_SCHEDULES, FULL, NoiseKey, epoch_order, philox_words, random_order, reversed_bits
from laddpo.core.tasks import pair_item
from tests.core.helpers import random_pair

OF_ANY_MODEL = [name for name, law in ESTIMATORS.items() if not law.is_exact]
PREFIX_CONSISTENT = [name for name, schedule in COUNT_SCHEDULES.items() if schedule.prefix_consistent]
# 99.99% points of chi-square, from tables: a fixed seed passes or fails for ever, so this is no chance of a false alarm
CHI2_LIMIT = {5: 25.7, 15: 44.3}

seeds = st.integers(0, 2**64)
ids = st.text("ab0-é ", max_size=12)
lengths = st.integers(1, 40)
estimators = st.builds(
    ElboEstimator,
    estimator=st.sampled_from(OF_ANY_MODEL),
    schedule=st.sampled_from(list(COUNT_SCHEDULES)),
    diffusion_samples=st.integers(1, 9),
    seed=seeds,
    shared_counts=st.booleans(),
    mask_rounds=st.integers(1, 3),
)


def same(a, b) -> bool:
    return a.index == b.index and a.weight == b.weight and np.array_equal(a.masked, b.masked)


def chi2(observed: np.ndarray) -> float:
    expected = observed.sum() / len(observed)
    return float(((observed - expected) ** 2 / expected).sum())


# Golden vectors. A change of any of these numbers silently pairs a reference store with other masks than the policy's:
# change the recipe's name ("laddpo-draw-v1") with it, and the store's FORMAT.


def test_words_of_a_key_are_the_golden_ones():
    words = NoiseKey(42, "pair", "chosen", 3).words("mask", 3)
    assert words.dtype == np.uint64
    assert words.tolist() == GOLDEN_WORDS
    assert NoiseKey(42, "été", "rejected", 0).words("count", 1).tolist() == GOLDEN_UNICODE


@given(st.binary(min_size=16, max_size=16), st.integers(0, 9), st.integers(0, 9))
def test_words_are_those_of_a_new_generator_whatever_was_asked_before(key, before, count):
    philox_words(key[::-1], before)
    expected = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    assert philox_words(key, count).tolist() == expected.tolist()


def test_orders_are_the_golden_ones():
    assert random_order(NoiseKey(42, "pair", "chosen", 0), 8).tolist() == GOLDEN_ORDER
    assert epoch_order(42, 1, 8).tolist() == GOLDEN_EPOCH_ORDER


@pytest.mark.parametrize("schedule", COUNT_SCHEDULES)
def test_fractions_are_the_golden_ones(schedule):
    found = [COUNT_SCHEDULES[schedule].fraction(NoiseKey(42, "pair", "both", 0), index, 4) for index in range(5)]
    assert found == GOLDEN_FRACTIONS[schedule]


@pytest.mark.parametrize("estimator", OF_ANY_MODEL)
def test_draws_are_the_golden_ones(estimator):
    e = ElboEstimator(estimator, "low_discrepancy", diffusion_samples=4, seed=42)
    found = [(d.masked.tolist(), d.weight) for d in (e.draw("pair", "rejected", 6, index) for index in range(3))]
    for (masked, weight), (golden_masked, golden_weight) in zip(found, GOLDEN_DRAWS[estimator], strict=True):
        assert masked == golden_masked
        assert weight == pytest.approx(golden_weight, rel=1e-15)


# A function of (seed, pair id, side, draw) alone


@given(seed=seeds, pair_id=ids, side=ids, draw=st.integers(0, 10**6), purpose=ids)
def test_every_field_of_a_key_matters(seed, pair_id, side, draw, purpose):
    words = NoiseKey(seed, pair_id, side, draw).words(purpose, 2).tolist()
    others = [
        NoiseKey(seed ^ 1, pair_id, side, draw).words(purpose, 2),
        NoiseKey(seed + 2**32, pair_id, side, draw).words(purpose, 2),
        NoiseKey(seed, pair_id + "x", side, draw).words(purpose, 2),
        NoiseKey(seed, pair_id, side + "x", draw).words(purpose, 2),
        NoiseKey(seed, pair_id, side, draw + 1).words(purpose, 2),
        NoiseKey(seed, pair_id, side, draw).words(purpose + "x", 2),
    ]
    assert all(words != other.tolist() for other in others)


def test_a_character_that_moves_to_the_next_field_gives_other_noise():
    for key, moved in ((("ab", "c", 0), ("a", "bc", 0)), (("a", "b", 12), ("a", "b1", 2))):
        assert NoiseKey(1, *key).words("p", 1).tolist() != NoiseKey(1, *moved).words("p", 1).tolist()


def test_drawing_neither_reads_nor_moves_any_global_generator():
    e = ElboEstimator()
    first = e.draw("pair", "chosen", 20, 0)
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert same(first, e.draw("pair", "chosen", 20, 0))
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


@given(e=estimators, order=st.permutations(range(6)), kept=st.integers(1, 6), epoch=st.integers(0, 4))
@settings(max_examples=50)
def test_batch_order_and_batch_mates_do_not_change_a_draw(e, order, kept, epoch):
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, f"pair-{i}", longest=12) for i in range(6)]
    draws = e.draw_indices(epoch)
    together = {item.id: item for item in (pair_item(pair, e, draws) for pair in pairs)}
    for i in order[:kept]:
        alone = pair_item(pairs[i], e, draws)
        for side, side_together in zip(alone.sides, together[alone.id].sides, strict=True):
            assert all(same(a.draw, b.draw) for a, b in zip(side, side_together, strict=True))


@given(e=estimators, pair_id=ids, length=lengths, index=st.integers(0, 30), other_n=st.integers(1, 64))
def test_prefix_consistent_schedules_do_not_depend_on_the_number_of_draws(e, pair_id, length, index, other_n):
    changed = ElboEstimator(e.estimator, e.schedule, other_n, e.seed, e.shared_counts)
    if e.schedule in PREFIX_CONSISTENT:
        assert same(e.draw(pair_id, "chosen", length, index), changed.draw(pair_id, "chosen", length, index))
        assert "diffusion_samples" not in e.store_fields()
    else:
        assert e.store_fields()["diffusion_samples"] == e.diffusion_samples


@pytest.mark.parametrize("schedule", ["stratified", "systematic"])
def test_grids_do_depend_on_the_number_of_draws(schedule):
    fraction = COUNT_SCHEDULES[schedule].fraction
    key = NoiseKey(1, "pair", "both", 0)
    assert [fraction(key, k, 4) for k in range(4)] != [fraction(key, k, 8) for k in range(4)]


# What a draw masks


@given(
    e=estimators, pair_id=ids, side=st.sampled_from(["chosen", "rejected"]), length=lengths, index=st.integers(0, 30)
)
@settings(max_examples=300)
def test_a_draw_masks_distinct_response_positions_with_a_finite_weight(e, pair_id, side, length, index):
    draw = e.draw(pair_id, side, length, index)
    masked = draw.masked.tolist()
    assert masked == sorted(set(masked)) and all(0 <= i < length for i in masked)
    assert draw.index == index and math.isfinite(draw.weight) and draw.weight >= 0


@given(e=estimators, pair_id=ids, length=lengths, index=st.integers(0, 30))
@settings(max_examples=300)
def test_the_masked_count_is_exactly_the_one_that_the_fraction_says(e, pair_id, length, index):
    draw = e.draw(pair_id, "chosen", length, index)
    if e.estimator == "count":
        fraction = e.count_fraction(Response(pair_id, "chosen", length), index, e.diffusion_samples)
        count = len(draw.masked)  # l masks the l-th of the L equal parts of [0, 1), in exact arithmetic
        assert (count - 1) * FULL <= fraction * length < count * FULL
        assert draw.weight == length / count
    elif e.estimator == "complement":
        inverse = e.draw(pair_id, "chosen", length, index ^ 1)
        assert sorted([*draw.masked, *inverse.masked]) == list(range(length))
        assert draw.weight == ((length + 1) / len(draw.masked) if len(draw.masked) else 0.0)
    elif e.estimator == "balanced":
        other = e.draw(pair_id, "chosen", length, index ^ 1)
        assert len(draw.masked) + len(other.masked) == length + 1
        assert draw.weight == length / len(draw.masked)
    else:
        assert 1 <= draw.weight <= 1000


@pytest.mark.parametrize("schedule", COUNT_SCHEDULES)
def test_a_response_of_one_token_works(schedule):
    count = ElboEstimator("count", schedule, 4)
    complement = ElboEstimator("complement", schedule, 4)
    for pair in range(20):
        for index in range(4):
            draw = count.draw(f"{pair}", "chosen", 1, index)
            assert draw.masked.tolist() == [0] and draw.weight == 1.0
        for index in (0, 2):
            halves = [complement.draw(f"{pair}", "chosen", 1, k) for k in (index, index + 1)]
            assert sorted((len(half.masked), half.weight) for half in halves) == [(0, 0.0), (1, 2.0)]


@given(e=estimators, pair_id=ids, length=lengths, index=st.integers(0, 30))
def test_shared_counts_give_both_sides_the_same_count_and_other_masks(e, pair_id, length, index):
    chosen, rejected = (e.draw(pair_id, side, length, index) for side in ("chosen", "rejected"))
    if e.shared_counts and e.estimator != "bernoulli":
        assert len(chosen.masked) == len(rejected.masked)
    chosen, rejected = (Response(pair_id, side, length) for side in ("chosen", "rejected"))
    assert e.key(chosen, index) != e.key(rejected, index)


def test_sides_have_counts_of_their_own_when_counts_are_not_shared():
    e = ElboEstimator("count", "iid", shared_counts=False)
    counts = [[len(e.draw(f"{i}", side, 50, 0).masked) for i in range(200)] for side in ("chosen", "rejected")]
    assert abs(np.corrcoef(counts)[0, 1]) < 0.25  # 200 pairs: 3.5 standard errors


def test_another_stream_is_another_family_of_draws():
    ours, theirs = ElboEstimator(), ElboEstimator(stream="reference")
    draws = [[e.draw(f"{i}", "chosen", 30, 0) for i in range(20)] for e in (ours, theirs)]
    assert not any(same(a, b) for a, b in zip(*draws, strict=True))


@given(e=estimators, epochs=st.integers(1, 9))
def test_epochs_rotate_through_the_rounds_of_masks(e, epochs):
    n = e.diffusion_samples
    seen = [list(e.draw_indices(epoch)) for epoch in range(epochs)]
    assert all(draws == list(range(k % e.mask_rounds * n, (k % e.mask_rounds + 1) * n)) for k, draws in enumerate(seen))


# Uniform: each single draw's fraction over [0, 1), orders over all permutations


@pytest.mark.parametrize("schedule", COUNT_SCHEDULES)
def test_the_fraction_of_every_single_draw_is_uniform(schedule):
    fraction, n, pairs, bins = COUNT_SCHEDULES[schedule].fraction, 4, 2000, 16
    for index in (0, 1, 3, 6):  # the last is of the second round of masks
        cells = [fraction(NoiseKey(7, f"pair-{i}", "both", 0), index, n) * bins // FULL for i in range(pairs)]
        assert chi2(np.bincount(cells, minlength=bins)) < CHI2_LIMIT[bins - 1], (schedule, index)


@pytest.mark.parametrize("index", [0, 1])
def test_the_masked_count_of_either_half_of_a_complement_is_uniform(index):
    e, length = ElboEstimator("complement", "low_discrepancy", 4, seed=7), 15
    counts = [len(e.draw(f"pair-{i}", "chosen", length, index).masked) for i in range(3000)]
    assert chi2(np.bincount(counts, minlength=length + 1)) < CHI2_LIMIT[length]


def test_random_orders_are_uniform_over_all_permutations():
    orders = [tuple(random_order(NoiseKey(7, f"pair-{i}", "chosen", 0), 3)) for i in range(3000)]
    observed = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(observed) == 6 and chi2(observed) < CHI2_LIMIT[5]


@pytest.mark.parametrize("schedule", ["low_discrepancy", "stratified", "systematic"])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_every_round_of_draws_puts_one_point_in_each_nth(schedule, n):
    for i in range(20):
        key = NoiseKey(3, f"pair-{i}", "both", 0)
        for round_ in range(2):
            points = sorted(COUNT_SCHEDULES[schedule].fraction(key, round_ * n + k, n) for k in range(n))
            if schedule == "stratified":
                assert [point * n // FULL for point in points] == list(range(n))
            else:  # equal steps, up to the integer division
                assert all(abs((b - a) - FULL // n) <= 1 for a, b in itertools.pairwise(points))


def test_van_der_corput_is_the_mirrored_binary_number():
    halves = [reversed_bits(k) / FULL for k in range(8)]
    assert halves == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


@given(seed=seeds, epoch=st.integers(0, 100), count=st.integers(0, 50))
def test_an_epoch_visits_every_item_once(seed, epoch, count):
    order = epoch_order(seed, epoch, count)
    assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() == epoch_order(seed, epoch, count).tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(seed, epoch, 20).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


GOLDEN_WORDS = [6716042734566998895, 18118806495159497901, 17875985318259238485]
GOLDEN_UNICODE = [8098376699949739165]
GOLDEN_ORDER = [5, 4, 1, 6, 7, 3, 2, 0]
GOLDEN_EPOCH_ORDER = [5, 0, 3, 7, 2, 6, 1, 4]
GOLDEN_FRACTIONS = {
    "iid": [13484350974381716662, 4117903662439258830, 8300756965936701093, 13101463945959372658, 16043935858987155305],
    "low_discrepancy": [
        16863803498575382532,
        7640431461720606724,
        3028745443293218820,
        12252117480147994628,
        722902434079524868,
    ],
    "stratified": [
        17545751040218956494,
        11109819691752295981,
        8107658738091514299,
        1049919091018420959,
        12050300036921432259,
    ],
    "systematic": [
        3726962749253367993,
        17562020804535531705,
        8338648767680755897,
        12950334786108143801,
        17387603469137079928,
    ],
    "single": [13484350974381716662] * 5,
}
GOLDEN_FRACTIONS["one_per_draw"] = GOLDEN_FRACTIONS["iid"]  # it differs between the blocks of a draw alone
GOLDEN_DRAWS = {
    "count": [([0, 1, 2, 3, 4, 5], 1.0), ([0, 3, 5], 2.0), ([0], 6.0)],
    "complement": [([2, 3, 4], 2.3333333333333335), ([0, 1, 5], 2.3333333333333335), ([0], 7.0)],
    "balanced": [([1, 2, 4], 2.0), ([0, 2, 4, 5], 1.5), ([3, 5], 3.0)],
    "bernoulli": [([0, 1, 2, 4, 5], 1.0937634984092712), ([1, 2, 4], 2.410949001688636), ([], 6.0597088249811195)],
}
