"""Losses against values derived by hand and against their claims; test_losses_trl.py compares them with TRL's."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laddpo.core.losses import (
    LOSSES,
    CompletionScores,
    LossOptions,
    PairScores,
    completion_loss,
    log_odds,
    preference_loss,
)

# One pair: B_w, B_l, R_w, R_l = -10, -13, -12, -12 nats, L_w, L_l = 4, 5 tokens. Ratios 2 and -1, margin 3; per token
# 0.5 and -0.2, margin 0.7.
PAIR = (-10.0, -13.0, -12.0, -12.0, 4.0, 5.0)
BETA = 0.5
OF_PAIRS = [name for name, row in LOSSES.items() if row.takes_pairs]


def scores(*rows: tuple[float, ...]) -> PairScores:
    return PairScores(*torch.tensor(rows or [PAIR], dtype=torch.float64).T)


def options(smoothing: float = 0.0, beta: float = BETA, **values: float) -> LossOptions:
    return LossOptions(beta, label_smoothing=smoothing, **values)


def smoothing_of(loss: str) -> float:
    return 0.1 if LOSSES[loss].takes_label_smoothing else 0.0


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


BY_HAND = {  # (loss, label smoothing): value at beta 0.5
    ("sigmoid", 0.0): math.log1p(math.exp(-1.5)),
    # 0.8 log(1 + e^-1.5) + 0.2 log(1 + e^1.5), and log(1 + e^x) = x + log(1 + e^-x)
    ("sigmoid", 0.2): math.log1p(math.exp(-1.5)) + 0.2 * 1.5,
    # (0.8 log(1 + e^-1.5) - 0.2 log(1 + e^1.5)) / 0.6 = log(1 + e^-1.5) - 0.2 * 1.5 / 0.6
    ("robust", 0.2): math.log1p(math.exp(-1.5)) - 0.5,
    ("robust", 0.0): math.log1p(math.exp(-1.5)),
    ("hinge", 0.0): 0.0,  # 1 - 0.5 * 3 < 0
    ("ipo", 0.0): 0.09,  # (0.7 - 1 / (2 * 0.5))^2
    ("apo_zero", 0.0): 1 - sigma(1.0) + sigma(-0.5),
    ("apo_down", 0.0): sigma(1.0) + 1 - sigma(1.5),
    ("sigmoid_norm", 0.0): math.log1p(math.exp(-0.35)),
    ("sigmoid_norm", 0.2): math.log1p(math.exp(-0.35)) + 0.2 * 0.35,
    ("dpop", 0.0): math.log1p(math.exp(-1.5)),  # chosen is above the reference
    # q = sigma(1.5) against 0.8, 1 - q against 0.2
    ("exo_pair", 0.2): sigma(1.5) * math.log(sigma(1.5) / 0.8) + sigma(-1.5) * math.log(sigma(-1.5) / 0.2),
    ("nca_pair", 0.0): -math.log(sigma(1.0)) - 0.5 * math.log(sigma(-1.0)) - 0.5 * math.log(sigma(0.5)),
    ("bco_pair", 0.0): -math.log(sigma(1.0)) - math.log(sigma(0.5)),
    ("sppo_hard", 0.0): (2 - 1) ** 2 + (-1 + 1) ** 2,  # 1 / (2 * 0.5) = 1
    # without the reference: -10 / 4 = -2.5 and -13 / 5 = -2.6 nats per token, 0.5 * 0.1 - 0.5 = -0.45
    ("simpo", 0.0): math.log1p(math.exp(0.45)),
    ("simpo", 0.2): math.log1p(math.exp(0.45)) - 0.2 * 0.45,
    ("cpo", 0.0): math.log1p(math.exp(-1.5)) + 2.5,
    ("cpo", 0.2): math.log1p(math.exp(-1.5)) + 0.2 * 1.5 + 2.5,
    # odds ratio e^0.1 (1 - e^-2.6) / (1 - e^-2.5); log(1 + 1 / ratio)
    ("orpo", 0.0): 2.5 + 0.5 * math.log1p(math.exp(-0.1) * (1 - math.exp(-2.5)) / (1 - math.exp(-2.6))),
}


@pytest.mark.parametrize(("loss", "smoothing"), BY_HAND)
def test_values_are_those_derived_by_hand(loss, smoothing):
    value = preference_loss(loss, scores(), options(smoothing))
    assert value.tolist() == pytest.approx([BY_HAND[loss, smoothing]], rel=1e-14)


def test_every_loss_has_a_value_by_hand():
    assert {loss for loss, _ in BY_HAND} == set(OF_PAIRS)


# Ratios 2 and -1 of 4 and 5 tokens, baseline 0.5: sigma(0.5 * 1.5) and sigma(0.5 * 1.5)
@pytest.mark.parametrize(
    ("loss", "desirable", "undesirable"),
    [
        ("kto", (1 - sigma(0.75), 1 - sigma(-0.75)), (1 - sigma(-0.75), 1 - sigma(0.75))),
        ("apo_zero_unpaired", (1 - sigma(1.0), 1 - sigma(-0.5)), (sigma(1.0), sigma(-0.5))),
    ],
)
def test_values_of_single_completions_are_those_derived_by_hand(loss, desirable, undesirable):
    """Both completions under both labels; the anchor of a desirable one is 10 / 4 and 13 / 5 nats a token."""
    policy, reference, tokens = (torch.tensor(x, dtype=torch.float64) for x in ([-10, -13], [-12, -12], [4, 5]))
    weighted = options(desirable_weight=2.0, undesirable_weight=0.5, sft_weight=0.1)
    for label, by_hand, weight in ((True, desirable, 2.0), (False, undesirable, 0.5)):
        found = CompletionScores(policy, reference, torch.tensor([label] * 2), tokens)
        assert completion_loss(loss, found, options(), 0.5).tolist() == pytest.approx(by_hand, rel=1e-14)
        heavy = CompletionScores(policy, reference, found.labels, tokens, torch.tensor([3.0, 1.0]).double())
        anchors = (0.25, 0.26) if label else (0.0, 0.0)
        expected = [w * (weight * x + anchor) for w, x, anchor in zip((3, 1), by_hand, anchors, strict=True)]
        assert completion_loss(loss, heavy, weighted, 0.5).tolist() == pytest.approx(expected, rel=1e-14)


def test_a_chosen_response_below_the_reference_pays_the_penalty_of_dpop():
    # ratios -1 and -3: margin 2, less 0.5 * 1; the target margin 0.25 is taken off after beta
    value = preference_loss("dpop", scores((-13, -15, -12, -12, 4, 5, 0.25)), options(dpop_lambda=0.5))
    assert value.tolist() == pytest.approx([math.log1p(math.exp(-0.5 * 1.5 + 0.25))], rel=1e-14)


@pytest.mark.parametrize("logp", [0.0, 1e-3, -1e-12, -1e-3, -800.0])
def test_the_odds_of_sure_and_of_impossible_tokens_are_finite(logp):
    """1 - e^-x is x where x is small; the odds of p = 1 count as those of the surest float32 below it."""
    leaf = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    found = log_odds(leaf)
    sure = min(logp, -(2.0**-23))
    assert found.item() == pytest.approx(sure - math.log(-math.expm1(sure)), rel=1e-12)
    pair = torch.stack([leaf[0] * 4, torch.tensor(-13.0).double(), *torch.tensor([-12.0, -12, 4, 5]).double()])
    for row in (pair, pair[[1, 0, 2, 3, 4, 5]], pair[[0, 0, 2, 3, 4, 4]]):
        loss = preference_loss("orpo", PairScores(*row[:, None]), options())
        (slope,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
        assert loss.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_a_pairs_weight_multiplies_its_loss_and_its_target_margin_is_what_its_row_says(loss):
    """The row says whether the loss reads the target margin; where it does, more of it is more loss."""
    smoothing = smoothing_of(loss)
    with_anchor = options(smoothing, sft_weight=0.3)
    plain = preference_loss(loss, scores(), with_anchor)
    assert torch.equal(preference_loss(loss, scores((*PAIR, 0.0, 2.5)), with_anchor), 2.5 * plain)
    shifted = preference_loss(loss, scores((*PAIR, 0.7, 1.0)), with_anchor)
    assert (shifted > plain).item() == LOSSES[loss].takes_margin and (shifted >= plain).all()
    if loss in ("sigmoid", "sigmoid_norm", "cpo", "simpo"):  # -log sigma(z - m): z was turned into z - 0.7
        score = {"sigmoid": 1.5, "sigmoid_norm": 0.35, "cpo": 1.5, "simpo": -0.45}[loss]
        expected = math.log1p(math.exp(0.7 - score)) - math.log1p(math.exp(-score)) - 0.7 * smoothing
        assert (shifted - plain).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_a_loss_looks_at_the_reference_exactly_when_its_row_says_so(loss):
    moved = scores((-10.0, -13.0, -12.5, -11.0, 4.0, 5.0))
    values = [preference_loss(loss, pairs, options(smoothing_of(loss))) for pairs in (scores(), moved)]
    is_equal = torch.equal(*values)
    assert is_equal != LOSSES[loss].needs_reference or loss == "hinge"  # 0 in both


OF_OPTIONS = {"dpop_lambda": 1.0, "simpo_gamma": 0.1, "cpo_alpha": 0.2, "label_smoothing": 0.2}


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_a_loss_reads_exactly_the_options_that_its_row_names(loss):
    pairs, before = many_pairs(), options(smoothing_of(loss))
    plain = preference_loss(loss, pairs, before)
    read = {
        name
        for name, value in OF_OPTIONS.items()
        if not torch.equal(plain, preference_loss(loss, pairs, replace(before, **{name: value})))
    }
    assert read == set(LOSSES[loss].reads)


def test_hinge_below_its_corner_is_one_minus_beta_times_the_margin():
    # margin (-12 + 12) - (-11 + 12) = -1
    assert preference_loss("hinge", scores((-12, -11, -12, -12, 4, 5)), options()).tolist() == [1.5]


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_the_sft_anchor_is_the_negative_bound_per_chosen_token(loss):
    without, with_anchor = (
        preference_loss(loss, scores(), options(smoothing_of(loss), sft_weight=weight)) for weight in (0.0, 0.05)
    )
    assert (with_anchor - without).tolist() == pytest.approx([0.05 * 10 / 4], rel=1e-12)


# Claims


def slopes_of(loss: str, pairs: PairScores, beta: float, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dB_w and dL/dB_l. # [pairs] each"""
    chosen, rejected = (x.clone().requires_grad_() for x in (pairs.policy_chosen, pairs.policy_rejected))
    fields = {**vars(pairs), "policy_chosen": chosen, "policy_rejected": rejected}
    value = LOSSES[loss].function(PairScores(**fields), options(smoothing, beta, dpop_lambda=1.0)).sum()
    return torch.autograd.grad(value, (chosen, rejected))


def many_pairs() -> PairScores:
    rng = np.random.default_rng(1)
    return scores(*np.concatenate([rng.uniform(-12, -8, (50, 4)), rng.integers(1, 9, (50, 2))], axis=1).tolist())


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_a_loss_depends_on_the_margin_alone_exactly_when_its_row_says_so(loss):
    chosen, rejected = slopes_of(loss, many_pairs(), 0.3, smoothing_of(loss))
    is_opposite = bool(((chosen + rejected).abs() <= 1e-14 * chosen.abs()).all())
    assert is_opposite == LOSSES[loss].depends_on_margin


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_slopes_have_the_sign_that_the_loss_promises(loss):
    """Chosen up and rejected down lower the loss; APO-down lowers both; IPO and hinge have a margin to reach."""
    pairs = many_pairs()
    chosen, rejected = slopes_of(loss, pairs, 0.3, 0.001 * (loss == "exo_pair"))
    per_token = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    if loss == "ipo":  # towards the target 1 / (2 beta) from either side
        below = per_token < 1 / 0.6
        assert below.any() and not below.all()
        assert torch.equal(chosen < 0, below) and torch.equal(rejected > 0, below)
    elif loss == "hinge":
        short = 0.3 * pairs.margin < 1
        assert short.any() and not short.all()
        assert torch.equal(chosen < 0, short) and torch.equal(rejected > 0, short)
        assert not chosen[~short].any() and not rejected[~short].any()
    elif loss == "apo_down":
        # where the pair is well separated, the push on chosen is downwards
        separated = pairs.margin > pairs.chosen_ratio.abs() + 1
        assert separated.any() and (chosen[separated] > 0).all() and (rejected > 0).all()
    elif loss == "sppo_hard":  # towards 1 / (2 beta) and -1 / (2 beta) from either side
        assert torch.equal(chosen < 0, pairs.chosen_ratio < 1 / 0.6)
        assert torch.equal(rejected > 0, pairs.rejected_ratio > -1 / 0.6)
    elif loss == "nca_pair":  # chosen towards the ratio r with sigma(-beta r) = sigma(beta r) / 2
        assert torch.equal(chosen < 0, pairs.chosen_ratio < math.log(2) / 0.3) and (rejected > 0).all()
    elif loss == "exo_pair":  # towards the score whose sigma is 0.999
        assert torch.equal(chosen < 0, 0.3 * pairs.margin < math.log(999)) and torch.equal(rejected, -chosen)
    else:
        assert (chosen < 0).all() and (rejected > 0).all()


@given(ratio=st.floats(-1e4, 1e4), other=st.floats(-1e4, 1e4), beta=st.floats(1e-3, 10))
def test_losses_and_slopes_stay_finite_far_from_the_reference(ratio, other, beta):
    pairs = scores((-1e5 + ratio, -1e5 + other, -1e5, -1e5, 3, 7))
    for loss in OF_PAIRS:
        assert torch.isfinite(LOSSES[loss].function(pairs, options(0.1, beta))).all(), loss
        assert all(torch.isfinite(slope).all() for slope in slopes_of(loss, pairs, beta, 0.1)), loss


@given(margin=st.floats(-20, 20), beta=st.floats(0.01, 5), smoothing=st.floats(0.01, 0.45))
def test_swapping_chosen_and_rejected_turns_the_margin_round(margin, beta, smoothing):
    """Conservative DPO mixes the two; robust DPO is its inverse: mixing robust losses gives plain DPO back."""
    there, back = scores((margin, 0, 0, 0, 2, 2)), scores((0, margin, 0, 0, 2, 2))
    plain = [LOSSES["sigmoid"].function(pairs, options(0.0, beta)) for pairs in (there, back)]
    mixed = LOSSES["sigmoid"].function(there, options(smoothing, beta))
    torch.testing.assert_close(mixed, (1 - smoothing) * plain[0] + smoothing * plain[1], rtol=1e-12, atol=1e-12)
    robust = [LOSSES["robust"].function(pairs, options(smoothing, beta)) for pairs in (there, back)]
    torch.testing.assert_close((1 - smoothing) * robust[0] + smoothing * robust[1], plain[0], rtol=1e-10, atol=1e-10)


def test_noise_in_the_score_biases_the_sigmoid_loss_by_at_most_an_eighth_of_its_variance():
    """The bound that docs and metrics cite: the second derivative of -log sigma is at most 1/4."""
    for score in np.linspace(-6, 6, 25):
        for spread in (0.1, 1.0, 3.0):
            noisy = torch.tensor([score - spread, score + spread], dtype=torch.float64)  # variance spread^2
            loss = -torch.nn.functional.logsigmoid(noisy).mean().item()
            bias = loss - math.log1p(math.exp(-score))
            assert 0 <= bias <= spread**2 / 8 + 1e-15
