"""Stream, two_pass and joint give one gradient: for every loss, estimator, anchor, budget, in float64 and float32.

Errors are measured against |c_w| |G_w| + |c_l| |G_l|, summed over pairs: c = dL/dB, G = the gradient of one side's B.
The step's gradient is a difference of the two products and may be much smaller than either.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from laddpo.core.draws import ESTIMATORS, ElboEstimator
from laddpo.core.elbo import draw_logps
from laddpo.core.gradient import (
    BACKWARD_MODES,
    Item,
    accumulate_gradient,
    pack_items,
    pack_sequence_runs,
    score_items,
)
from laddpo.core.losses import LOSSES, LossOptions
from laddpo.core.objectives import DpoObjective, SftObjective
from laddpo.core.tasks import RESPONSE
from laddpo.errors import RunFault
from tests.core.helpers import (
    ANY_BUDGET,
    LinearDenoiser,
    parameters_of,
    random_ids,
    random_pair,
    referenced_items,
    tiny_denoiser,
)

ANCHORS = (0.0, 0.3)
OF_ANY_MODEL = [name for name, law in ESTIMATORS.items() if not law.is_exact]
OF_PAIRS = [name for name, row in LOSSES.items() if row.takes_pairs]
FIRST = OF_PAIRS[:7]  # what a loss does with its values is alike under all estimators: the others run under one
CASES = [*itertools.product(FIRST, OF_ANY_MODEL, ANCHORS), *itertools.product(OF_PAIRS[7:], ["balanced"], ANCHORS)]


@pytest.fixture(scope="module")
def wide():
    """The tiny model in float64."""
    return tiny_denoiser(torch.float64)


@pytest.fixture(scope="module")
def single():
    """The same in float32."""
    return tiny_denoiser(torch.float32)


def objective(loss: str, sft_weight: float = 0.0) -> DpoObjective:
    smoothing = 0.1 if LOSSES[loss].takes_label_smoothing else 0.0
    return DpoObjective(loss, LossOptions(beta=0.3, label_smoothing=smoothing, sft_weight=sft_weight))


def random_case(denoiser, loss: str, estimator: str, sft_weight: float, seed: int) -> tuple[DpoObjective, list[Item]]:
    """1 to 4 pairs of 1 to 6 tokens a side, 1 to 5 draws, references away from the policy by a nat or so; every second
    pair with a weight and, if the loss reads it, a target margin."""
    rng = np.random.default_rng([seed, *map(ord, loss + estimator), int(10 * sft_weight)])
    pairs = [random_pair(rng, f"{seed}-{i}", prompt=int(rng.integers(0, 4))) for i in range(int(rng.integers(1, 5)))]
    margin = 0.7 if LOSSES[loss].takes_margin else 0.0
    pairs[1::2] = [replace(pair, weight=2.5, margin=margin) for pair in pairs[1::2]]
    e = ElboEstimator(estimator, diffusion_samples=int(rng.integers(1, 6)), seed=seed)
    return objective(loss, sft_weight), referenced_items(denoiser, pairs, e, spread=1.0)


def budgets(items: list[Item], seed: int) -> list[int]:
    """Below one sequence, below one pair, some pairs, and more than enough."""
    pair = max(item.tokens for item in items)
    return [1, max(1, pair - 1), pair + seed % 7, ANY_BUDGET]


def gradient(denoiser, items, goal, mode: str, budget: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The step's gradient as one vector, per-draw values and losses."""
    parameters = parameters_of(denoiser)
    for parameter in parameters:
        parameter.grad = None
    values = accumulate_gradient(denoiser, parameters, items, goal, 1 / len(items), budget, mode)
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    return torch.cat(flat), values.draws, values.losses


def scale_of(denoiser, items, goal) -> float:
    """sum over pairs of |c_w| |G_w| + |c_l| |G_l|, over the number of pairs."""
    total = 0.0
    for item in items:
        values = score_items(denoiser, [item], ANY_BUDGET).requires_grad_()
        (slopes,) = torch.autograd.grad(goal.losses([item], values).sum(), values)
        for side, slope in zip(item.sides, slopes[0], strict=True):
            bound = draw_logps(denoiser, side).mean()
            if bound.requires_grad:
                norm = sum((g**2).sum() for g in torch.autograd.grad(bound, parameters_of(denoiser))) ** 0.5
                total += float(slope.sum().abs() * norm)
    return total / len(items)


def error(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    difference = float((a.double() - b.double()).norm())
    return difference / scale if scale else difference


@pytest.mark.parametrize(("loss", "estimator", "sft_weight"), CASES)
def test_modes_agree_in_float64_for_any_budget(loss, estimator, sft_weight, wide):
    goal, items = random_case(wide, loss, estimator, sft_weight, seed=1)
    expected, draws, losses = gradient(wide, items, goal, "joint", ANY_BUDGET)
    scale = scale_of(wide, items, goal)
    assert scale > 0 or goal.loss == "hinge" or not any(item.tokens for item in items)
    for mode, budget in itertools.product(("stream", "two_pass"), budgets(items, seed=1)):
        found, found_draws, found_losses = gradient(wide, items, goal, mode, budget)
        assert error(found, expected, scale) <= 1e-12, (mode, budget)
        torch.testing.assert_close(found_draws, draws, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found_losses, losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("loss", "estimator", "sft_weight"), CASES)
def test_modes_agree_in_float32_within_the_stated_tolerances(loss, estimator, sft_weight, single):
    goal, items = random_case(single, loss, estimator, sft_weight, seed=3)
    expected = gradient(single, items, goal, "joint", ANY_BUDGET)[0]
    scale = scale_of(single, items, goal)
    for mode in ("stream", "two_pass"):
        assert error(gradient(single, items, goal, mode, ANY_BUDGET)[0], expected, scale) <= 1e-6, mode
        for budget in budgets(items, seed=3)[:-1]:
            assert error(gradient(single, items, goal, mode, budget)[0], expected, scale) <= 1e-5, (mode, budget)


def test_gradients_of_a_sft_row_agree_for_any_budget(wide):
    rng = np.random.default_rng(0)
    e = ElboEstimator(diffusion_samples=5)
    items = [
        Item(f"{i}", (e.sequences(f"{i}", RESPONSE, random_ids(rng, 2), random_ids(rng, 1 + i), range(5)),))
        for i in range(4)
    ]
    expected, draws, losses = gradient(wide, items, SftObjective(), "joint", ANY_BUDGET)
    assert losses.tolist() == pytest.approx([-draws[i, 0].mean().item() / (1 + i) for i in range(4)], rel=1e-14)
    for mode, budget in itertools.product(("stream", "two_pass"), budgets(items, 1)):
        found = gradient(wide, items, SftObjective(), mode, budget)[0]
        assert error(found, expected, float(expected.norm())) <= 1e-12, (mode, budget)


def test_the_gradient_is_that_of_the_loss_by_finite_differences(wide):
    goal, items = random_case(wide, "sigmoid", "complement", 0.3, seed=5)
    found = gradient(wide, items, goal, "stream", 10)[0]
    parameters = parameters_of(wide)
    direction = torch.randn(len(found), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mean_loss(step: float) -> float:
        parts = direction.split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.add_(step * part.view_as(parameter))
            value = goal.losses(items, score_items(wide, items, ANY_BUDGET)).mean().item()
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.sub_(step * part.view_as(parameter))
        return value

    h = 1e-5
    slope = (8 * (mean_loss(h) - mean_loss(-h)) - (mean_loss(2 * h) - mean_loss(-2 * h))) / (12 * h)
    assert slope == pytest.approx(float(found @ direction), rel=1e-7)


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("budget", [5, 30, ANY_BUDGET])
def test_an_untrained_policy_has_margin_exactly_zero(mode, budget, single):
    """In float32, at equal packing: the same masks in the same micro-steps give the same bits."""
    at_zero = {"sigmoid": math.log(2), "robust": math.log(2), "sigmoid_norm": math.log(2), "hinge": 1.0}
    at_zero |= {"ipo": 1 / (2 * 0.3) ** 2, "apo_zero": 1.0, "apo_down": 1.0, "dpop": math.log(2)}
    # two errors of 1 / (2 beta) each; twice log 2; both halves of (log 1/2 - log 0.9) and (log 1/2 - log 0.1)
    at_zero |= {"sppo_hard": 2 / 0.6**2, "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2)}
    at_zero["exo_pair"] = -math.log(2) - (math.log(0.9) + math.log(0.1)) / 2
    _, items = random_case(single, "sigmoid", "complement", 0.0, seed=7)
    packed_as = ANY_BUDGET if mode == "joint" else budget
    reference = score_items(single, sorted(items, key=lambda item: item.tokens), packed_as)
    items = [
        Item(item.id, item.sides, values.numpy())
        for item, values in zip(sorted(items, key=lambda item: item.tokens), reference, strict=True)
    ]
    assert at_zero.keys() == {name for name in OF_PAIRS if LOSSES[name].needs_reference}
    for loss, sft_weight in itertools.product(at_zero, ANCHORS):
        goal = objective(loss, sft_weight)
        _, draws, losses = gradient(single, items, goal, mode, budget)
        assert torch.equal(draws, reference), loss
        anchors = [-draws[i, 0].mean().item() / item.response_tokens[0] for i, item in enumerate(items)]
        expected = [at_zero[loss] + sft_weight * anchor for anchor in anchors]
        assert losses.tolist() == pytest.approx(expected, rel=1e-14), loss


# What accumulates where


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("budget", [5, ANY_BUDGET])
def test_gradients_add_to_what_is_there(mode, budget, wide):
    goal, items = random_case(wide, "apo_zero", "complement", 0.3, seed=1)
    once = gradient(wide, items, goal, mode, budget)[0]
    accumulate_gradient(wide, parameters_of(wide), items, goal, 1 / len(items), budget, mode)
    twice = torch.cat([p.grad.flatten() for p in parameters_of(wide)])
    torch.testing.assert_close(twice, 2 * once, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("budget", [5, ANY_BUDGET])
def test_frozen_parameters_get_no_gradient(mode, budget):
    denoiser = tiny_denoiser()
    trained = [p for name, p in denoiser.model.named_parameters() if "attn_out" in name]
    for parameter in denoiser.model.parameters():
        parameter.requires_grad_(any(parameter is t for t in trained))
    goal, items = random_case(denoiser, "ipo", "count", 0.0, seed=2)
    accumulate_gradient(denoiser, trained, items, goal, 1.0, budget, mode)
    assert all((p.grad is not None) == p.requires_grad for p in denoiser.model.parameters())


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("budget", [1, ANY_BUDGET])
def test_a_step_in_which_nothing_is_masked_has_no_gradient(mode, budget, wide):
    """One draw of `complement` on one-token responses masks nothing half of the time."""
    e = ElboEstimator("complement", diffusion_samples=1)
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, f"{i}", longest=1) for i in range(20)]
    items = [item for item in referenced_items(wide, pairs, e) if not item.tokens]
    assert items
    found, draws, losses = gradient(wide, items, objective("sigmoid"), mode, budget)
    assert not found.any() and not draws.any() and losses.tolist() == [pytest.approx(math.log(2))] * len(items)


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_a_non_finite_draw_reaches_loss_and_gradient(mode):
    """No mode hides an overflow: the loop looks at both."""
    denoiser = LinearDenoiser()
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, f"{i}") for i in range(3)]
    items = referenced_items(denoiser, pairs, ElboEstimator())
    with torch.no_grad():
        denoiser.head.fill_(math.nan)
    for budget in (5, ANY_BUDGET):
        denoiser.zero_grad()
        values = accumulate_gradient(
            denoiser, list(denoiser.parameters()), items, objective("sigmoid"), 1.0, budget, mode
        )
        assert not torch.isfinite(values.losses).any()
        assert not torch.isfinite(denoiser.head.grad).any()


class Cramped(LinearDenoiser):
    """Runs out of memory above so many tokens, as CUDA says it."""

    tokens = 0

    def token_logps(self, packed):
        if sum(packed.lengths) > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return super().token_logps(packed)


@pytest.mark.parametrize("mode", ["stream", "two_pass"])
@pytest.mark.parametrize("tokens", [9, 25, 70])
def test_memory_that_runs_out_changes_no_gradient(mode, tokens):
    """Also where it runs out halfway, with gradients of earlier micro-steps and of an earlier call at hand."""
    denoiser = Cramped()
    denoiser.tokens = ANY_BUDGET
    rng = np.random.default_rng(4)
    items = referenced_items(denoiser, [random_pair(rng, f"{i}") for i in range(5)], ElboEstimator(), spread=1.0)
    parameters = list(denoiser.parameters())
    for _ in range(2):
        accumulate_gradient(denoiser, parameters, items, objective("apo_zero"), 1.0, ANY_BUDGET, "joint")
    expected = [p.grad.clone() for p in parameters]
    denoiser.zero_grad()
    for budget in (ANY_BUDGET, 100):
        denoiser.tokens = tokens if budget == 100 else ANY_BUDGET
        accumulate_gradient(denoiser, parameters, items, objective("apo_zero"), 1.0, budget, mode)
    torch.testing.assert_close([p.grad for p in parameters], expected, rtol=1e-12, atol=1e-14)


def test_a_sequence_that_does_not_fit_alone_stops_the_run():
    denoiser = Cramped()
    items = [Item("a", (ElboEstimator("count").sequences("a", "chosen", np.int32([1]), np.int32([1, 2]), range(4)),))]
    with pytest.raises(RunFault, match="one sequence of 3 tokens does not fit"):
        accumulate_gradient(denoiser, list(denoiser.parameters()), items, SftObjective(), 1.0, 100)


# Packing


@pytest.mark.parametrize("mode", ["stream", "two_pass"])
@pytest.mark.parametrize("budget", [1, 7, 20, 60])
def test_no_micro_step_exceeds_the_budget_unless_one_sequence_does(mode, budget):
    denoiser = LinearDenoiser()
    rng = np.random.default_rng(4)
    items = referenced_items(denoiser, [random_pair(rng, f"{i}") for i in range(5)], ElboEstimator(diffusion_samples=6))
    longest = max(s.tokens for item in items for s in item.sequences)
    shortest = min(s.tokens for item in items for s in item.sequences if s.tokens)
    for run in (
        lambda: accumulate_gradient(denoiser, list(denoiser.parameters()), items, objective("ipo"), 1.0, budget, mode),
        lambda: score_items(denoiser, items, budget),
    ):
        denoiser.packed_tokens.clear()
        run()
        assert max(denoiser.packed_tokens) <= max(budget, longest)
        if budget < shortest:
            assert max(denoiser.packed_tokens) == longest, "a sequence over the budget is alone"


@pytest.mark.parametrize("mode", ["stream", "two_pass"])
def test_more_draws_do_not_make_a_micro_step_larger(mode):
    peaks = {}
    for draws in (4, 64):
        denoiser = LinearDenoiser()
        rng = np.random.default_rng(4)
        items = referenced_items(denoiser, [random_pair(rng, "0", longest=6)], ElboEstimator(diffusion_samples=draws))
        denoiser.packed_tokens.clear()
        accumulate_gradient(denoiser, list(denoiser.parameters()), items, objective("sigmoid"), 1.0, 20, mode)
        score_items(denoiser, items, 20)
        peaks[draws] = max(denoiser.packed_tokens)
    assert peaks[64] <= 20 and peaks[4] <= 20


def test_items_are_packed_by_length_and_none_is_lost():
    rng = np.random.default_rng(1)
    items = referenced_items(LinearDenoiser(), [random_pair(rng, f"{i}") for i in range(9)], ElboEstimator())
    for budget in (1, 50, 120, ANY_BUDGET):
        groups = pack_items(items, budget)
        assert sorted(i for group in groups for i in group) == list(range(9))
        assert all(len(group) == 1 or sum(items[i].tokens for i in group) <= budget for group in groups)
        order = [items[i].tokens for group in groups for i in group]
        assert order == sorted(order)
    assert pack_items(items, None) == [list(range(9))]
    assert pack_items([], 10) == pack_items([], None) == []


def test_runs_of_sequences_keep_their_order():
    rng = np.random.default_rng(1)
    sequences = ElboEstimator("count", diffusion_samples=9).sequences(
        "p", "chosen", random_ids(rng, 2), random_ids(rng, 4), range(9)
    )
    for budget, sizes in ((1, [1] * 9), (12, [2, 2, 2, 2, 1]), (17, [2, 2, 2, 2, 1]), (18, [3, 3, 3]), (1000, [9])):
        runs = pack_sequence_runs(sequences, budget)
        assert [len(run) for run in runs] == sizes
        assert [s.draw.index for run in runs for s in run] == list(range(9))


# One buffer where one is enough


@pytest.mark.parametrize(("loss", "sft_weight"), list(itertools.product(OF_PAIRS, ANCHORS)))
def test_coefficient_groups_name_draws_of_equal_derivative_up_to_sign(loss, sft_weight, wide):
    goal, items = random_case(wide, loss, "count", sft_weight, seed=9)
    values = score_items(wide, items, ANY_BUDGET).requires_grad_()
    (slopes,) = torch.autograd.grad(goal.losses(items, values).sum(), values)
    labels, signs = goal.coefficient_groups(*values.shape[1:])
    assert set(np.unique(signs)) <= {-1, 1}
    for label in np.unique(labels):
        for item_slopes in (slopes * torch.as_tensor(signs)).numpy():
            group = item_slopes[labels == label]
            np.testing.assert_allclose(group, group[0], rtol=1e-13)
    expected = 1 if LOSSES[loss].depends_on_margin and not sft_weight else 2
    assert len(np.unique(labels)) == expected


def test_a_sft_row_needs_one_buffer():
    labels, signs = SftObjective().coefficient_groups(1, 4)
    assert labels.tolist() == [[0] * 4] and signs.tolist() == [[1] * 4]
