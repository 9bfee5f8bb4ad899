"""The variance measurement: numpy's on what it saw, rows that are those of conf/dpo, whole tables and pictures."""

import dataclasses

import numpy as np
import pytest
import torch

from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import accumulate_gradient
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective
from laddpo.estimator_study import report, techniques
from laddpo.estimator_study.intervals import Intervals
from laddpo.estimator_study.noise import (
    BASELINE,
    SEED_STEP,
    SETTINGS,
    AtStart,
    GradientSpread,
    drift,
    measure,
    noise_items,
    per_pair,
    reference_values,
    summarise,
)
from laddpo.estimator_study.step_noise import Step, noise_table, recommended
from laddpo.inputs.reference_values import training_estimator
from laddpo.settings.compose import compose
from laddpo.storage.atomic import write_json
from tests.core.helpers import ANY_BUDGET, parameters_of, random_pair, tiny_denoiser

EVALUATIONS, PAIRS, FEW, SEED, BETA = 5, 6, 3, 42, 0.7


@pytest.fixture(scope="module")
def models():
    """A policy and the reference that it has moved a little away from."""
    policy, reference = tiny_denoiser(), tiny_denoiser()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype))
    return policy, reference


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(2)
    return [random_pair(rng, f"pair-{i}", longest=6) for i in range(PAIRS)]


@pytest.fixture(scope="module")
def measured(models, pairs):
    """A few settings at two numbers of draws."""
    return {(name, n): measure_one(models, pairs, name, n) for name in ("naive", BASELINE, "default") for n in (1, 4)}


def measure_one(models, pairs, name: str, draws: int):
    policy, reference = models
    setting = SETTINGS[name]
    values = reference_values(reference, pairs, setting, draws, SEED, EVALUATIONS, ANY_BUDGET)
    objective = DpoObjective("sigmoid", LossOptions(BETA))
    model = policy, parameters_of(policy), pairs, name, setting, draws, SEED
    return measure(*model, EVALUATIONS, values, objective, FEW, ANY_BUDGET)


def page_of(pairs, of_own: dict, rows: list[dict], studies: dict) -> dict:
    """The content of variance.json. `of_own`: the run's own estimator, by its number of draws."""
    step = Step(4, 2, 100)
    table = noise_table(of_own, step, Intervals(FEW, np.random.default_rng(0)))
    token = {"pair": "p", "share": 0.6, "side": "chosen", "position": 1, "reference_logp": -2.0, "tokens": 9}
    return {
        **{"run": "run", "model": "tiny", "data": "random", "loss": "sigmoid", "beta": BETA, "pairs": PAIRS},
        **{"gradient_pairs": FEW, "evaluations": EVALUATIONS, "trainable_parameters": 1, "prompts": PAIRS},
        "response_tokens": report.length_words(pairs),
        "is_start": False,
        "drift": drift(of_own[4]),
        "step": {**dataclasses.asdict(step), "block_length": 0},
        "step_noise": table,
        "recommended": recommended(table),
        "focus": {"differing": 0.5},
        "tokens": [{**token, "token": "<b>|", "text_before": "1+"}, {**token, "share": 0.2}],
        "token_seconds": 1.0,
        "settings": rows,
        "techniques": studies,
    }


# The rows


@pytest.mark.parametrize("name", ["default", "vrpo_paper", "naive"])
def test_rows_named_as_presets_draw_as_those_presets_do(name):
    config = compose([f"dpo={name}", "dpo.diffusion_samples=4"])
    expected = dataclasses.replace(SETTINGS[name].estimator, seed=config.seed)
    assert training_estimator(config.dpo, config.seed, 0) == expected
    assert SETTINGS[name].common == config.dpo.common_random_numbers


def test_rows_differ_from_each_other():
    rows = [(row.estimator, row.common) for row in SETTINGS.values()]
    assert len(set(rows)) == len(rows)


def test_evaluations_draw_fresh_masks_and_the_same_for_policy_and_reference():
    setting = SETTINGS["default"]
    estimators = [setting.of(4, SEED, e, 0) for e in range(3)]
    masks = [[tuple(e.draw("p", "chosen", 30, k).masked) for k in range(4)] for e in estimators]
    assert len({tuple(m) for m in masks}) == 3
    assert setting.reference(estimators[0]) == estimators[0]
    assert SETTINGS["naive"].reference(estimators[0]) != estimators[0]


# The numbers


def test_variances_are_numpys_on_gradients_taken_one_by_one(models, pairs, measured):
    policy, _ = models
    found = measured["default", 4]
    parameters, objective = parameters_of(policy), DpoObjective("sigmoid", LossOptions(BETA))
    for i in range(FEW):
        gradients, scores = [], []
        for e in range(EVALUATIONS):
            estimator = dataclasses.replace(SETTINGS["default"].estimator, seed=SEED + (e + 1) * SEED_STEP)
            (item,) = noise_items([pairs[i]], estimator, found.reference[e, i : i + 1])
            policy.model.zero_grad()
            values = accumulate_gradient(policy, parameters, [item], objective, 1.0, ANY_BUDGET)
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]).numpy().copy())
            ratio = values.draws[0].numpy() - item.reference
            scores.append(BETA * (ratio[0].mean() - ratio[1].mean()))
        assert found.gradient[i] == pytest.approx(np.var(gradients, axis=0, ddof=1).sum(), rel=1e-9)
        unbiased = (np.mean(gradients, axis=0) ** 2).sum() - found.gradient[i] / EVALUATIONS
        assert found.gradient_mean[i] == pytest.approx(unbiased, rel=1e-9)
        assert per_pair(found, BETA)["score"][i] == pytest.approx(np.var(scores, ddof=1), rel=1e-9)
    assert found.losses.shape == (EVALUATIONS, PAIRS)
    assert found.losses[2, 1] == pytest.approx(float(np.logaddexp(0, -found.scores(BETA)[2, 1])), rel=1e-12)


def test_one_gradient_twice_has_no_variance():
    parameter = torch.nn.Parameter(torch.zeros(3))
    spread = GradientSpread(1)
    for _ in range(2):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5])
        spread.add_gradient(0, [parameter])
        assert parameter.grad is None
    trace, signal = spread.traces()
    assert trace.tolist() == [0.0] and signal.tolist() == [5.25]
    assert [found.tolist() for found in spread.lengths()] == [[5.25], [[5.25]]]


def test_the_table_compares_with_the_baseline_at_equal_draws(measured):
    rows = summarise(list(measured.values()), BETA, np.random.default_rng(0))
    by_key = {(row["setting"], row["draws"]): row for row in rows}
    for n in (1, 4):
        row, base = by_key["default", n], by_key[BASELINE, n]
        assert row["score"]["ratio"] == pytest.approx(row["score"]["value"] / base["score"]["value"])
        low, high = row["score"]["ratio_interval"]
        assert low <= row["score"]["ratio"] <= high
        assert "ratio" not in base["score"]
    assert by_key["default", 1]["own_estimate"] is None and by_key["default", 4]["own_estimate"] > 0
    # VRPO's ordering: common masks are worth more than any number of draws, more draws are better than one
    assert by_key["naive", 4]["score"]["value"] > 10 * by_key[BASELINE, 4]["score"]["value"]
    assert by_key[BASELINE, 4]["score"]["value"] < by_key[BASELINE, 1]["score"]["value"]


def test_where_training_starts_scores_are_exactly_0_and_gradients_still_vary(models, pairs):
    """As with the model's own values as the reference's, which rounding would make almost equal."""
    policy, _ = models
    objective, setting = DpoObjective("sigmoid", LossOptions(BETA)), SETTINGS["default"]
    model = policy, parameters_of(policy), pairs, "own", setting, 4, SEED, EVALUATIONS
    found = measure(*model, None, objective, FEW, ANY_BUDGET)
    assert not found.scores(BETA).any() and not found.losses.var(axis=0).any()
    values = reference_values(policy, pairs, setting, 4, SEED, EVALUATIONS, ANY_BUDGET)
    known = measure(*model, values, objective, FEW, ANY_BUDGET)
    np.testing.assert_allclose(found.gradient, known.gradient, rtol=1e-9)
    assert (found.gradient > 0).all()
    assert AtStart(objective).coefficient_groups(2, 4)[1].tolist() == objective.coefficient_groups(2, 4)[1].tolist()


def test_what_does_not_vary_has_no_ratios_and_still_a_page(models, pairs, measured, tmp_path, with_pictures):
    """The policy is the reference: under common masks every score is 0."""
    _, reference = models
    chosen = [measured[name, 4] for name in (BASELINE, "naive", "default")]
    same = [dataclasses.replace(m, policy=m.reference) if m.name != "naive" else m for m in chosen]
    rows = summarise(same, BETA, np.random.default_rng(0))
    assert [row["score"]["value"] > 0 for row in rows] == [False, True, False]
    assert all(row["score"]["ratio"] is row["score"]["ratio_interval"] is None for row in rows[1:])
    found, objective, few = same[-1], DpoObjective("sigmoid", LossOptions(BETA)), pairs[:FEW]
    mixed = techniques.reference_mixture(reference, found.estimator_of, EVALUATIONS, few)
    study = techniques.study(found, mixed, objective, reference, parameters_of(reference), few, ANY_BUDGET)
    assert study["control_variate"]["score_variance_ratio"] is None
    assert study["adaptive_draws"] == {"known": None, "own": None}
    assert study["upper_bound"]["score_variance_ratio"] is None
    own = {4: same[-1], 1: measured["default", 1]}
    result = page_of(pairs, own, rows, {4: study})
    write_json(tmp_path / "variance.json", result)
    assert "V of score x –" in report.markdown_page(result)
    assert report.terminal_table(result)
    report.variance_plot(result, tmp_path / "variance.png")


def test_drift_is_policy_minus_reference(measured):
    found = measured[BASELINE, 4]
    moved = drift(found)
    assert moved["chosen"]["moved"] == pytest.approx((found.policy - found.reference)[:, :, 0].mean())
    assert moved["rejected"]["reference"] == pytest.approx(found.reference[:, :, 1].mean())


# Techniques


def test_token_values_give_back_the_draws(models, pairs):
    policy, _ = models
    for item in noise_items(pairs, ElboEstimator("complement", diffusion_samples=4), None):
        values = techniques.token_values(policy, item)
        found = torch.stack([(logps * hidden * weights).sum(dim=1) for logps, hidden, weights in values])
        from laddpo.core.gradient import score_items

        torch.testing.assert_close(found, score_items(policy, [item], ANY_BUDGET)[0])


def test_all_techniques_are_measured_and_shown(models, pairs, measured, tmp_path, with_pictures):
    policy, reference = models
    found, objective = measured["default", 4], DpoObjective("sigmoid", LossOptions(BETA))
    few = pairs[:FEW]
    mixed = techniques.reference_mixture(reference, found.estimator_of, EVALUATIONS, few)
    assert mixed.shape == (EVALUATIONS, FEW)
    study = techniques.study(found, mixed, objective, policy, parameters_of(policy), few, ANY_BUDGET)
    assert set(study["gradient"]) == {"second_order", "cross_fit"}
    assert study["loss"]["none"]["variance"] == pytest.approx(found.losses.var(axis=0, ddof=1).mean())
    assert np.isfinite(list(study["upper_bound"].values())).all()
    rows = summarise(list(measured.values()), BETA, np.random.default_rng(0))
    result = page_of(pairs, {n: measured["default", n] for n in (1, 4)}, rows, {4: study})
    page = report.markdown_page(result)
    said = ("| default | 4 |", "control variate", "second_order", "cross_fit", "SPG", "B(y_w)", "&lt;b>\\|", "60%")
    for words in said:
        assert words in page, words
    assert report.terminal_table(result).count("\n") == 1 + len(measured)
    report.variance_plot(result, tmp_path / "variance.png")
    assert (tmp_path / "variance.png").stat().st_size > 10_000


def test_the_control_variate_is_judged_on_draws_it_did_not_see(measured):
    found = techniques.control_variate(measured[BASELINE, 4], BETA)
    assert found["stored_draws"] == (EVALUATIONS - 1) * 4
    assert found["score_variance_ratio"] > 0 and found["bias_bound"] > 0
