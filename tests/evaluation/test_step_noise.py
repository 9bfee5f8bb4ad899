"""The noise of a step: traces of covariances that are known, what is recommended, and what a page says of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from laddpo.estimator_study import answers
from laddpo.estimator_study.intervals import Intervals
from laddpo.estimator_study.step_noise import Step, noise_table, recommended
from tests.evaluation.test_intervals import MEAN, SIZE

PAIRS, EVALUATIONS = 400, 4


def measured(draws: int, masks: float, shrinks: float = 1.0):
    """Gradients of many pairs whose traces are known: 2 between pairs, `masks` / draws within."""
    centres = shrinks * (MEAN + np.sqrt(2 / SIZE) * np.random.default_rng(5).standard_normal((PAIRS, SIZE)))
    rng = np.random.default_rng(draws)
    noise = shrinks * np.sqrt(masks / draws / SIZE) * rng.standard_normal((PAIRS, EVALUATIONS, SIZE))
    gradients = centres[:, None] + noise
    means = gradients.mean(axis=1)
    return SimpleNamespace(
        draws=draws,
        gradient=gradients.var(axis=1, ddof=1).sum(axis=-1),
        gradient_length=(gradients**2).sum(axis=-1).mean(axis=1),
        gradient_products=means @ means.T,
    )


@pytest.fixture(scope="module")
def intervals():
    return Intervals(PAIRS, np.random.default_rng(0), resamples=300)


def rows(intervals, masks: float):
    of_own = {n: measured(n, masks) for n in (1, 2, 4, 8)}
    return {row["draws"]: row for row in noise_table(of_own, Step(4, 32, 1000), intervals)}


def test_masks_and_pairs_are_told_apart_and_steps_have_equal_forwards(intervals):
    found = rows(intervals, masks=4.0)
    for n, row in found.items():
        assert row["within"]["value"] == pytest.approx(4 / n, rel=0.05)
        assert row["between"]["value"] == pytest.approx(2, rel=0.1)
        assert row["mask_share"]["value"] == pytest.approx((4 / n) / (2 + 4 / n), rel=0.1)
        assert row["signal"]["value"] == pytest.approx(0.49, rel=0.3)
        assert row["pairs_per_step"] * n == 128
        assert row["noise"]["value"] == pytest.approx((2 + 4 / n) / row["pairs_per_step"], rel=0.1)
        low, high = row["mask_share"]["interval"]
        assert low < (4 / n) / (2 + 4 / n) < high
    assert found[1]["relative"]["value"] == pytest.approx((6 / 128) / (3 / 32), rel=0.05)
    assert "relative" not in found[4]


def test_fewer_draws_of_more_pairs_are_recommended_where_that_is_shown(intervals):
    assert recommended(list(rows(intervals, masks=4.0).values()))["draws"] == 1
    alone = rows(intervals, masks=4000.0)  # masks alone make noise: every n is alike
    assert recommended(list(alone.values())) is None


def test_less_noise_with_less_signal_is_not_recommended(intervals):
    """As with one draw, whose noisy scores saturate the loss: here a twentieth of the gradient is left."""
    own = {1: measured(1, 40.0, 0.05), 4: measured(4, 4.0)}
    noisy, usual = noise_table(own, Step(4, 32, 1000), intervals)
    assert noisy["relative_corrected"][1] < 1 < noisy["relative_over_signal"]["value"]
    assert recommended([noisy, usual]) is None
    result = {"step": {"draws": 4}, "step_noise": [noisy, usual], "recommended": None}
    assert "times the noise for its signal. Keep n = 4" in answers.recommendation(result)


def test_a_step_that_cannot_be_is_left_out():
    step = Step(draws=4, pairs=2, training_pairs=6)
    assert [step.pairs_at(n) for n in (1, 2, 3, 4, 8, 16)] == [None, 4, None, 2, 1, None]
    assert Step(4, 32, 10).pairs_at(4) == 32  # the run's own step, whatever there is


UNKNOWN = {"value": 0.5, "interval": None}
FOCUS = {"differing": 0.97, "gradient": {"value": 0.4, "interval": [0.1, 2.0]}, "score": UNKNOWN}


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ([0.3, 0.9], "it helps"),
        ([0.8, 1.2], "no difference is shown"),
        ([1.1, 2.0], "set dpo.focus=none"),
        (None, "no difference is shown"),
    ],
)
def test_the_focus_has_its_sentence(interval, said):
    focus = FOCUS | {"step": {"value": 0.7, "interval": interval}}
    sentence = answers.focus_words({"focus": focus, "is_start": True})
    assert said in sentence and "differ in 97% of their tokens" in sentence


def test_an_answer_names_what_to_set(intervals):
    table = list(rows(intervals, masks=4.0).values())
    result = {
        "step": {"draws": 4, "pairs": 32, "training_pairs": 1000, "block_length": 4},
        "step_noise": table,
        "recommended": recommended(table),
    }
    said = answers.recommendation(result)
    assert "set dpo.diffusion_samples=1 and 128 pairs a step" in said
    page = "\n".join(answers.step_section(result))
    assert "31.2 steps at 32 pairs" in page and "block model" in page
    assert "n = 8 is shown to be worse. Keep n = 4" in answers.recommendation(result | {"recommended": None})
