"""Intervals and paired comparisons: values by hand, published examples, coverage by simulation."""

import functools
import math

import numpy as np
import pytest

from laddpo.results.stats import (
    Difference,
    compare,
    difference_over_seeds,
    holm,
    mcnemar_exact,
    mean_with_error,
    newcombe_interval,
    normal_quantile,
    paired_bootstrap,
    paired_shares,
    student_quantile,
    student_tail,
    wilson_interval,
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_wilson_of_ten_in_ten_is_n_over_n_plus_z_squared():
    low, high = wilson_interval(10, 10)
    assert low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)  # algebra: p = 1 leaves n / (n + z^2)
    assert high == 1.0


def test_wilson_of_half_is_symmetric_around_one_half():
    # p = 1/2 leaves half width z / (2 sqrt(n + z^2)) = 1.959964 / (2 sqrt(103.841459)) = 0.0961685
    low, high = wilson_interval(50, 100)
    assert (low, high) == (pytest.approx(0.5 - 0.0961685, abs=1e-6), pytest.approx(0.5 + 0.0961685, abs=1e-6))


def test_wilson_without_items_knows_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_covers_at_its_level_averaged_over_small_samples():
    n, coverage = 20, []
    intervals = [wilson_interval(k, n) for k in range(n + 1)]
    for p in np.linspace(0.02, 0.98, 97):  # exact coverage from the binomial distribution, no simulation
        weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        coverage.append(sum(w for w, (low, high) in zip(weights, intervals, strict=True) if low <= p <= high))
    assert 0.94 < np.mean(coverage) < 0.965


def test_mean_with_error_of_one_to_four():
    result = mean_with_error([1.0, 2.0, 3.0, 4.0])  # variance 5/3, error sqrt(5/12)
    assert (result.mean, result.items) == (2.5, 4)
    assert result.std_error == pytest.approx(math.sqrt(5 / 12))
    assert result.interval()[1] == pytest.approx(2.5 + 1.959964 * math.sqrt(5 / 12), abs=1e-6)


def test_mean_of_one_value_has_no_error():
    assert math.isnan(mean_with_error([3.0]).std_error)


def test_groups_of_copies_have_the_error_of_the_originals():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    copied, names = np.repeat(values, 7), np.repeat(list("abcde"), 7)
    assert mean_with_error(copied, names).std_error == pytest.approx(mean_with_error(values).std_error)
    assert mean_with_error(copied).std_error < 0.5 * mean_with_error(values).std_error  # what ignoring groups claims


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(AssertionError, match="1 of 2 values are not finite"):
        mean_with_error([1.0, math.nan])


def test_mcnemar_counts_the_binomial_tail_of_the_disagreements():
    base = [True] + [False] * 7 + [True] * 5
    tuned = [False] + [True] * 7 + [True] * 5
    assert mcnemar_exact(base, tuned) == 2 * (1 + 8) / 2**8
    assert mcnemar_exact(base, base) == 1.0


def test_mcnemar_survives_thousands_of_disagreements():
    assert mcnemar_exact([False] * 3000 + [True], [True] * 3000 + [False]) == 0.0


def test_newcombe_reproduces_a_worked_table():
    # both right 36, only base 12, only tuned 2, neither 0, of 50: proportions .96 and .76, Wilson bounds .8654/.9890
    # and .6259/.8570, phi = (36*0 - 12*2) / sqrt(48*2*38*12) = -.1147, and for the lower bound
    # .2 + sqrt(.1341^2 + 2*.1147*.1341*.0290 + .0290^2) = .2 + .1404; Newcombe's paper prints .0569 to .3404
    base = [True] * 36 + [True] * 12 + [False] * 2
    tuned = [True] * 36 + [False] * 12 + [True] * 2
    assert newcombe_interval(base, tuned) == (pytest.approx(-0.3404, abs=5e-5), pytest.approx(-0.0569, abs=5e-5))


def test_newcombe_is_no_point_where_all_outcomes_agree():
    low, high = newcombe_interval([True] * 40, [True] * 40)
    assert low < 0 < high
    found = paired_shares([1.0] * 40, [1.0] * 40, generator())
    assert (found.low, found.high) == (low, high)


@pytest.mark.parametrize(("gained", "lost"), [(3, 0), (4, 0), (5, 1), (6, 0), (0, 7), (4, 3)])
def test_an_interval_of_few_differences_says_what_their_test_says(gained, lost):
    base, tuned = [0] * gained + [1] * lost + [0, 1] * 196, [1] * gained + [0] * lost + [0, 1] * 196
    entry = compare(base, tuned, generator(), is_share=True)
    low, high = entry["interval"]
    assert (low > 0 or high < 0) == (entry["mcnemar_p"] < 0.05)
    five = paired_shares(base * 5, tuned * 5, generator(), groups=list(range(len(base))) * 5)  # each seed says the same
    assert (five.low, five.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(("gains", "losses"), [(2, 2), (5, 1), (6, 6), (8, 2)])
def test_intervals_cover_where_few_of_many_items_differ(gains, losses):
    # 1000 trials at 95%: fewer than 927 would be 3.3 standard errors away; Newcombe's is wide at the very fewest
    rng, n, covered = generator(5), 100, 0

    @functools.cache
    def interval(gained, lost):
        both = round(0.6 * (n - gained - lost))
        alike = [1] * both + [0] * (n - gained - lost - both)
        return paired_shares([0] * gained + [1] * lost + alike, [1] * gained + [0] * lost + alike, rng)

    for gained, lost, _ in rng.multinomial(n, [gains / n, losses / n, 1 - (gains + losses) / n], size=1000):
        found = interval(int(gained), int(lost))
        covered += found.low <= (gains - losses) / n <= found.high
    assert covered >= 927


def test_items_of_a_group_that_agree_are_worth_one_item():
    # 8 problems under 5 seeds, all with the outcome that they had before: what 8 problems tell, and not what 40 would
    right = [1.0] * 4 + [0.0] * 4
    problems = list(range(8)) * 5
    one, five = (
        paired_shares(right, right, generator()),
        paired_shares(right * 5, right * 5, generator(), groups=problems),
    )
    assert one.low < 0 < one.high
    assert (five.low, five.high) == (pytest.approx(one.low), pytest.approx(one.high))


def test_bootstrap_of_equal_generators_is_equal_and_others_differ():
    base, tuned = generator(1).random(50), generator(2).random(50)
    first = paired_bootstrap(base, tuned, generator(3), resamples=500)
    assert first == paired_bootstrap(base, tuned, generator(3), resamples=500)
    assert first != paired_bootstrap(base, tuned, generator(4), resamples=500)


def test_bootstrap_in_pieces_equals_bootstrap_at_once(monkeypatch):
    base, tuned = generator(1).random(50), generator(2).random(50)
    whole = paired_bootstrap(base, tuned, generator(3), resamples=500)
    monkeypatch.setattr("laddpo.results.stats.RESAMPLED_VALUES_AT_ONCE", 50 * 7)
    assert paired_bootstrap(base, tuned, generator(3), resamples=500) == whole


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    base = generator(1).normal(size=2000)
    tuned = base + generator(2).normal(0.3, 1.0, size=2000)  # paired: the spread of `base` cancels
    result = paired_bootstrap(base, tuned, generator(3), resamples=4000)
    expected = normal_quantile(0.95) * (tuned - base).std(ddof=1) / math.sqrt(2000)
    assert (result.high - result.low) / 2 == pytest.approx(expected, rel=0.06)
    assert result.difference == pytest.approx((tuned - base).mean())


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_covers_the_true_difference(grouped):
    # true difference 0.2 - 0.1; 300 trials at 95%: fewer than 270 or none missed would be 4 standard errors away
    rng, covered = generator(7), 0
    for _ in range(300):
        size = 5 if grouped else 1
        tuned = np.repeat(rng.random(80) < 0.2, size).astype(float)
        base = np.repeat(rng.random(80) < 0.1, size).astype(float)
        names = np.repeat(np.arange(80), size).tolist() if grouped else None
        result = paired_bootstrap(base, tuned, rng, groups=names, resamples=400)
        covered += result.low <= 0.1 + 1e-12 and result.high >= 0.1 - 1e-12
    assert 270 <= covered < 300


@pytest.mark.parametrize("is_crossed", [False, True])
def test_intervals_over_seeds_cover_the_true_difference(is_crossed):
    # runs differ by seed (0.03) and by problem; 1000 trials at 95%: between 93% and 97% are expected
    rng, covered, too_narrow = generator(8), 0, 0
    for _ in range(1000):
        problems = rng.normal(0.1, 0.4, size=60)
        runs = []
        for seed in range(5):
            values = problems if is_crossed else rng.normal(0.1, 0.4, size=60)
            values = values + rng.normal(0, 0.03) + rng.normal(0, 0.3, size=60)
            runs.append({i if is_crossed else (seed, i): value for i, value in enumerate(values)})
        found = difference_over_seeds(runs)
        covered += found.low <= 0.1 <= found.high
        means = [np.mean(list(run.values())) for run in runs]
        reach = student_quantile(4) * np.std(means, ddof=1) / np.sqrt(5)
        too_narrow += abs(np.mean(means) - 0.1) > reach
    assert 930 <= covered <= 985
    if is_crossed:
        assert too_narrow > 150  # seeds alone do not know that other problems would give another answer


def test_bootstrap_refuses_lists_that_cannot_be_paired():
    with pytest.raises(AssertionError, match="2 base values for 3 tuned"):
        paired_bootstrap([0, 1], [0, 1, 1], generator())


def test_compare_gives_the_entry_of_results_json():
    base, tuned = [0, 0, 0, 1] * 25, [0, 1, 1, 1] * 25
    entry = compare(base, tuned, generator(), is_share=True)
    assert (entry["base"], entry["tuned"], entry["difference"], entry["items"]) == (0.25, 0.75, 0.5, 100)
    assert entry["interval"][0] < 0.5 < entry["interval"][1]
    assert entry["base_interval"] == list(wilson_interval(25, 100))
    assert entry["mcnemar_p"] == pytest.approx(2 * 0.5**50)


def test_compare_gives_no_wilson_interval_to_ties_that_are_certain():
    entry = compare([0.5] * 20, [1.0] * 15 + [0.0] * 5, generator(), is_share=True, is_base_known=True)
    assert entry["base_interval"] == [0.5, 0.5]  # every margin of an untrained policy is exactly 0
    assert "mcnemar_p" not in entry


def test_a_margin_is_no_proportion_whatever_its_values():
    entry = compare([0.0], [0.0], generator(), groups=["a"], is_share=False, is_base_known=True)
    assert entry["interval"] is None and entry["tuned_interval"] is None and entry["base_interval"] == [0.0, 0.0]
    entry = compare([0.0, 0.0], [0.0, 1.0], generator(), is_share=False, is_base_known=True)
    assert entry["interval"] == [0.0, 1.0] and "mcnemar_p" not in entry
    assert entry["tuned_interval"][0] < 0  # a margin may be negative


@pytest.mark.parametrize("tuned", [[0.007], [0.007] * 6, [0.1 + 0.2, 0.3]])
def test_numbers_without_spread_have_no_interval(tuned):
    entry = compare([0.0] * len(tuned), tuned, generator(), is_share=False)
    assert entry["interval"] is entry["tuned_interval"] is entry["base_interval"] is None


@pytest.mark.parametrize("base", [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8, [0] * 8])
def test_answers_that_agree_on_every_item_are_no_proof_of_equal_models(base):
    entry = compare(base, base, generator(), is_share=True)
    assert entry["interval"] == list(newcombe_interval(base, base))
    assert entry["interval"][0] < 0 < entry["interval"][1]


def test_every_pair_preferred_rightly_is_a_wilson_interval_around_the_ties_of_the_base():
    groups = [number // 2 for number in range(256)]  # two pairs of each prompt
    entry = compare([0.5] * 256, [1.0] * 256, generator(), groups, is_share=True, is_base_known=True)
    low, high = wilson_interval(128, 128)
    assert entry["interval"] == [low - 0.5, high - 0.5] and entry["tuned_interval"] == [low, high]


def test_prompts_with_one_right_and_one_wrong_pair_each_are_no_certainty():
    entry = compare([0.5] * 6, [0.0, 1.0] * 3, generator(), list("aabbcc"), is_share=True, is_base_known=True)
    assert entry["interval"][0] < 0 < entry["interval"][1]


def test_student_s_tail_and_quantile_are_those_of_the_tables():
    for degrees, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert student_quantile(degrees) == pytest.approx(quantile, abs=6e-4)
        assert student_tail(quantile, degrees) == pytest.approx(0.025, abs=2e-5)
        assert student_tail(-quantile, degrees) == pytest.approx(0.975, abs=2e-5)
    assert Difference(0.06, 0.00447, 0.11553, 10, degrees=4).p_above(0) == pytest.approx(0.02, abs=2e-3)
    assert Difference(0.1, 0.1, 0.1, 1).p_above(0) == 0 and Difference(0.0, 0.0, 0.0, 1).p_above(0) == 0.5


def test_holm_s_correction_is_right_in_a_worked_example_and_keeps_its_promise():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []
    rng = np.random.default_rng(0)
    false = [min(holm(list(rng.random(10)))) < 0.05 for _ in range(2000)]
    assert 0.035 < np.mean(false) < 0.065  # of studies in which nothing differs, one in twenty says that something does
