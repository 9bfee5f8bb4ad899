"""Techniques beyond the masks do what their formulas say, by enumeration; every backward mode knows their gradients."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import accumulate_gradient
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective
from laddpo.estimator_study.corrections import CORRECTIONS, CorrectedObjective, half_labels
from laddpo.estimator_study.techniques import (
    allocate_draws,
    control_bias,
    control_coefficients,
    controlled_margins,
    mixture,
    upper_bound,
)
from tests.core import oracle
from tests.core.helpers import ANY_BUDGET, parameters_of, random_ids, random_pair, referenced_items, tiny_denoiser

PROMPT = np.array([1, 4, 2], dtype=np.int32)


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser()


@pytest.fixture(scope="module")
def items(denoiser):
    """Three pairs under eight draws, references away from the policy by a nat or so."""
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, f"{i}", longest=4, prompt=2) for i in range(3)]
    return referenced_items(denoiser, pairs, ElboEstimator("complement", diffusion_samples=8), spread=1.0)


# Corrections of the loss


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "apo_zero"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_modes_agree_for_any_budget(correction, loss, sft_weight, denoiser, items):
    goal = CorrectedObjective(DpoObjective(loss, LossOptions(0.3, sft_weight=sft_weight)), correction, block=2)
    parameters = parameters_of(denoiser)

    def gradient(mode: str, budget: int) -> torch.Tensor:
        denoiser.model.zero_grad()
        accumulate_gradient(denoiser, parameters, items, goal, 1 / len(items), budget, mode)
        return torch.cat([p.grad.flatten() for p in parameters])

    expected = gradient("joint", ANY_BUDGET)
    for mode, budget in itertools.product(("stream", "two_pass"), (1, 30, ANY_BUDGET)):
        assert float((gradient(mode, budget) - expected).norm()) <= 1e-11 * float(expected.norm()), (mode, budget)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_equal_draws_leave_nothing_to_correct(correction):
    draws = torch.tensor([[[1.5] * 4, [-0.5] * 4]], dtype=torch.float64)
    corrected = CORRECTIONS[correction](sigmoid_of_margin, draws, 2)
    assert corrected.tolist() == pytest.approx(sigmoid_of_margin(draws, range(4)).tolist(), rel=1e-14)


def sigmoid_of_margin(draws: torch.Tensor, which) -> torch.Tensor:
    means = draws[..., list(which)].mean(dim=-1)
    return -logsigmoid(means[:, 0] - means[:, 1])


def two_point_draws(score: float, noise: float, draws: int) -> torch.Tensor:
    """All equally likely outcomes of independent draws score +- noise of the chosen side. # [2^draws, 2, draws]"""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=draws)), dtype=torch.float64)
    return torch.stack([score + noise * signs, torch.zeros_like(signs)], dim=1)


@pytest.mark.parametrize("score", [-1.0, 0.5, 2.0])
def test_the_second_order_correction_takes_out_most_of_the_bias(score):
    truth = math.log1p(math.exp(-score))
    draws = two_point_draws(score, 1.2, 4)  # V = 1.44 / 4
    plain = float(sigmoid_of_margin(draws, range(4)).mean()) - truth
    corrected = float(CORRECTIONS["second_order"](sigmoid_of_margin, draws, 1).mean()) - truth
    assert abs(plain) > 0.01
    assert abs(corrected) < 0.15 * abs(plain)


def test_the_second_order_correction_is_half_the_curvature_times_the_variance():
    score, noise = 0.7, 1e-3
    draws = two_point_draws(score, noise, 4)
    variance = draws[:, 0].var(dim=-1) / 4
    curvature = torch.sigmoid(torch.tensor(score)) * torch.sigmoid(torch.tensor(-score))
    removed = sigmoid_of_margin(draws, range(4)) - CORRECTIONS["second_order"](sigmoid_of_margin, draws, 1)
    np.testing.assert_allclose(removed, 0.5 * curvature * variance, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("is_unbiased", [False, True])
def test_cross_fitting_takes_the_covariance_out_of_the_gradient(is_unbiased):
    """Draw k is theta (1 + e_k): its derivative by theta is noisy in the same e_k as the coefficient.

    With independent halves E[f'(s_A) ds_B] = E[f'(s_A)] E[ds_B]; the same draws for both add their covariance.
    """
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    noise = two_point_draws(0.0, 0.8, 4)
    draws = theta * (noise + torch.tensor([[1.0], [0.0]]))
    cross_fitted, plain = CORRECTIONS["cross_fit"](sigmoid_of_margin, draws, 1), sigmoid_of_margin(draws, range(4))
    losses = cross_fitted if is_unbiased else plain
    (gradient,) = torch.autograd.grad(losses.mean(), theta)
    halves = two_point_draws(1.0, 0.8, 2)[:, 0].mean(dim=-1)
    coefficient = (-torch.sigmoid(-halves)).mean() if is_unbiased else None
    if is_unbiased:
        assert float(gradient) == pytest.approx(float(coefficient), rel=1e-12)  # E[ds_B] = 1
    else:
        whole = two_point_draws(1.0, 0.8, 4)[:, 0].mean(dim=-1)
        assert abs(float(gradient) - float(-torch.sigmoid(-whole).mean())) > 0.01


def test_cross_fitting_reports_the_published_loss():
    draws = two_point_draws(0.3, 1.0, 4)
    found = CORRECTIONS["cross_fit"](sigmoid_of_margin, draws, 1)
    torch.testing.assert_close(found, sigmoid_of_margin(draws, range(4)))


def test_halves_keep_blocks_whole():
    assert half_labels(8, 2).tolist() == [0] * 4 + [1] * 4
    assert half_labels(6, 2).tolist() == [0, 0, 1, 1, 1, 1]
    assert half_labels(5, 2).tolist() == [0, 0, 1, 1, 1]


# The reference as control variate


def correlated_draws(pairs: int = 40, draws: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference draws around -10, policy draws that follow them with slope 1.6 and noise of their own."""
    rng = np.random.default_rng(1)
    common = rng.standard_normal((pairs, 2, draws))
    policy = -9 + 1.6 * common + 0.3 * rng.standard_normal((pairs, 2, draws))
    return torch.from_numpy(policy), torch.from_numpy(-10 + common)


def test_a_pairs_coefficient_never_saw_its_own_draws():
    policy, reference = correlated_draws()
    before = control_coefficients(policy, reference)
    policy[3] = 7 * policy[3]
    after = control_coefficients(policy, reference)
    assert before[3] == pytest.approx(float(after[3]), rel=1e-12)
    assert not torch.allclose(before[4:], after[4:])


def test_the_fitted_coefficient_has_less_variance_than_common_numbers_alone():
    policy, reference = correlated_draws()
    mean = torch.full((40, 2), -10.0, dtype=torch.float64)
    fitted = control_coefficients(policy, reference)
    assert fitted.mean() == pytest.approx(1.6, abs=0.1)
    errors = {
        name: float(controlled_margins(policy, reference, mean, c).square().mean())
        for name, c in (("fitted", fitted), ("one", torch.ones(40)), ("none", torch.zeros(40)))
    }
    assert errors["fitted"] < 0.5 * errors["one"] < errors["none"]


def test_an_error_of_the_stored_mean_moves_the_margin_by_the_bound():
    policy, reference = correlated_draws()
    mean, error = torch.full((40, 2), -10.0, dtype=torch.float64), torch.tensor([0.3, -0.4], dtype=torch.float64)
    fitted = control_coefficients(policy, reference)
    moved = controlled_margins(policy, reference, mean + error, fitted)
    moved = moved - controlled_margins(policy, reference, mean, fitted)
    torch.testing.assert_close(moved, -(1 - fitted) * 0.7)
    bound = control_bias(fitted, error.abs().expand(40, 2))
    torch.testing.assert_close(bound, (1 - fitted).abs() * 0.5)


def test_with_a_coefficient_of_one_the_stored_mean_does_not_matter():
    policy, reference = correlated_draws()
    one = torch.ones(40, dtype=torch.float64)
    first, second = (controlled_margins(policy, reference, torch.full((40, 2), m).double(), one) for m in (-10.0, 5.0))
    torch.testing.assert_close(first, second)


# Where to put the draws


def test_draws_follow_the_standard_deviation_in_whole_blocks():
    assert allocate_draws(np.array([1.0, 1.0, 1.0, 1.0]), 16, 2).tolist() == [4, 4, 4, 4]
    assert allocate_draws(np.array([3.0, 1.0]), 8, 1).tolist() == [6, 2]
    assert allocate_draws(np.array([5.0, 0.0, 0.0]), 12, 2).tolist() == [8, 2, 2]


def test_no_other_allocation_of_the_same_total_has_less_variance():
    spread, total = np.array([0.3, 1.0, 2.2]), 9
    best = min(
        (sum(spread**2 / np.array(counts)), counts)
        for counts in itertools.product(range(1, 8), repeat=3)
        if sum(counts) == total
    )
    assert allocate_draws(spread, total, 1).tolist() == list(best[1])


# The upper bound for rejected responses


@torch.no_grad()
def test_the_upper_bound_lies_above_the_elbo_and_meets_it_for_small_gamma(denoiser):
    """Over all masks of a response of four tokens, each with its probability: no estimation in it."""
    response = random_ids(np.random.default_rng(3), 4)
    masks = oracle.nonempty_masks(4)
    logps, hidden, weights = [], [], []
    for mask in masks:
        logits = denoiser.model(
            input_ids=torch.tensor([[*PROMPT.tolist(), *(7 if i in mask else int(t) for i, t in enumerate(response))]])
        ).logits[0]
        logps.append(logits.log_softmax(-1)[len(PROMPT) + torch.arange(4), torch.tensor(response).long()])
        hidden.append([i in mask for i in range(4)])
        # probability of the mask, times L / l, times the number of masks: the mean over the list is the expectation
        weights.append(len(masks) / (4 * math.comb(4, len(mask))) * 4 / len(mask))
    values = torch.stack(logps), torch.tensor(hidden), torch.tensor(weights, dtype=torch.float64)[:, None]
    elbo = oracle.exact_bound(denoiser, PROMPT, response).item()
    bounds = [upper_bound(*values, gamma).item() for gamma in (1e-6, 0.5, 1.0, 2.0)]
    assert bounds[0] == pytest.approx(elbo, abs=1e-4)
    assert elbo < bounds[1] < bounds[2] < bounds[3]
    likelihood = anyorder_logp(denoiser, response)
    assert elbo < likelihood < bounds[2]
    assert mixture(torch.tensor(elbo), torch.tensor(bounds[2]), 0.25).item() == pytest.approx(
        0.75 * elbo + 0.25 * bounds[2], rel=1e-6
    )


@torch.no_grad()
def anyorder_logp(denoiser, response: np.ndarray) -> float:
    """log of the mean over generation orders of the product of the conditionals: what B bounds from below."""
    total = 0.0
    for order in itertools.permutations(range(len(response))):
        logp = 0.0
        for step, position in enumerate(order):
            hidden = set(order[step:])
            seen = [7 if i in hidden else int(token) for i, token in enumerate(response)]
            logits = denoiser.model(input_ids=torch.tensor([[*PROMPT.tolist(), *seen]])).logits[0]
            logp += logits[len(PROMPT) + position].log_softmax(-1)[int(response[position])].item()
        total += math.exp(logp) / math.factorial(len(response))
    return math.log(total)


def test_the_upper_bound_by_hand():
    """One token hidden in both draws, p = 1/2 and 1/4, weights 1: log((1/2 + 1/4) / 2)."""
    logps = torch.tensor([[0.5], [0.25]], dtype=torch.float64).log()
    found = upper_bound(logps, torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.float64))
    assert found.item() == pytest.approx(math.log(0.375), rel=1e-12)
