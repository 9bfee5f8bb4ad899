"""Losses against values derived by hand, against TRL's own code where it is installed, and against their claims."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laddpo.core.losses import LOSSES, PairScores, preference_loss

# One pair: B_w, B_l, R_w, R_l = -10, -13, -12, -12 nats, L_w, L_l = 4, 5 tokens. Ratios 2 and -1, margin 3; per token
# 0.5 and -0.2, margin 0.7.
PAIR = (-10.0, -13.0, -12.0, -12.0, 4.0, 5.0)
BETA = 0.5


def scores(*rows: tuple[float, ...]) -> PairScores:
    return PairScores(*torch.tensor(rows or [PAIR], dtype=torch.float64).T)


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
}


@pytest.mark.parametrize(("loss", "smoothing"), BY_HAND)
def test_values_are_those_derived_by_hand(loss, smoothing):
    value = preference_loss(loss, scores(), BETA, smoothing, sft_weight=0.0)
    assert value.tolist() == pytest.approx([BY_HAND[loss, smoothing]], rel=1e-14)


def test_every_loss_has_a_value_by_hand():
    assert {loss for loss, _ in BY_HAND} == LOSSES.keys()


def test_hinge_below_its_corner_is_one_minus_beta_times_the_margin():
    # margin (-12 + 12) - (-11 + 12) = -1
    assert preference_loss("hinge", scores((-12, -11, -12, -12, 4, 5)), BETA, 0.0, 0.0).tolist() == [1.5]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_sft_anchor_is_the_negative_bound_per_chosen_token(loss):
    without, with_anchor = (preference_loss(loss, scores(), BETA, 0.0, weight) for weight in (0.0, 0.05))
    assert (with_anchor - without).tolist() == pytest.approx([0.05 * 10 / 4], rel=1e-12)


# Against TRL


def trl_loss(loss: str, pairs: PairScores, beta: float, smoothing: float) -> torch.Tensor:
    """The loss that trl.DPOTrainer computes for these log-probabilities, through its own `_compute_loss`.

    The fake model says that every completion token has the same share of the response's log-probability.
    """
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    lengths = torch.cat([pairs.chosen_tokens, pairs.rejected_tokens]).int().tolist()
    logps = torch.cat([pairs.policy_chosen, pairs.policy_rejected])
    longest = max(lengths)
    completion = torch.tensor([[0] + [1] * n + [0] * (longest - n) for n in lengths])  # one prompt token, then padding
    per_token = logps[:, None] / torch.tensor(lengths)[:, None] * completion[:, 1:]
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    itself = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        use_weighting=False,
        beta=beta,
        label_smoothing=smoothing,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": pairs.reference_chosen,
        "ref_rejected_logps": pairs.reference_rejected,
    }
    try:
        return trainer._compute_loss(itself, lambda **_: outputs, inputs, return_outputs=False)
    except (AttributeError, KeyError, TypeError) as error:  # another version of TRL asks for other things
        pytest.skip(f"this TRL's _compute_loss cannot be called on numbers: {error!r}")


@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_slopes_equal_those_of_trl(loss):
    """TRL's sigmoid and sigmoid_norm ignore label smoothing; its robust does not."""
    smoothing = 0.2 if loss == "robust" else 0.0
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.uniform(-30, -1, (6, 4)), rng.integers(1, 9, (6, 2))], axis=1)
    found, slopes = {}, {}
    for name in ("ours", "trl"):
        ratios = torch.tensor(rows.T, dtype=torch.float64)
        policy = ratios[:2].clone().requires_grad_()
        pairs = PairScores(*policy, *ratios[2:])
        value = preference_loss(loss, pairs, 0.07, smoothing, 0.0).mean() if name == "ours" else None
        value = trl_loss(loss, pairs, 0.07, smoothing) if value is None else value
        found[name] = value.item()
        (slopes[name],) = torch.autograd.grad(value, policy)
    assert found["ours"] == pytest.approx(found["trl"], rel=1e-12)
    torch.testing.assert_close(slopes["ours"], slopes["trl"], rtol=1e-12, atol=1e-15)


# Claims


def slopes_of(loss: str, pairs: PairScores, beta: float, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dB_w and dL/dB_l. # [pairs] each"""
    chosen, rejected = (x.clone().requires_grad_() for x in (pairs.policy_chosen, pairs.policy_rejected))
    fields = {**vars(pairs), "policy_chosen": chosen, "policy_rejected": rejected}
    value = LOSSES[loss].function(PairScores(**fields), beta, smoothing).sum()
    return torch.autograd.grad(value, (chosen, rejected))


def many_pairs() -> PairScores:
    rng = np.random.default_rng(1)
    return scores(*np.concatenate([rng.uniform(-12, -8, (50, 4)), rng.integers(1, 9, (50, 2))], axis=1).tolist())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_depends_on_the_margin_alone_exactly_when_its_row_says_so(loss):
    smoothing = 0.1 if LOSSES[loss].takes_label_smoothing else 0.0
    chosen, rejected = slopes_of(loss, many_pairs(), 0.3, smoothing)
    is_opposite = bool(((chosen + rejected).abs() <= 1e-14 * chosen.abs()).all())
    assert is_opposite == LOSSES[loss].depends_on_margin


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_uses_label_smoothing_exactly_when_its_row_says_so(loss):
    without, with_smoothing = (LOSSES[loss].function(many_pairs(), 0.3, e) for e in (0.0, 0.1))
    assert bool((without != with_smoothing).any()) == LOSSES[loss].takes_label_smoothing


@pytest.mark.parametrize("loss", LOSSES)
def test_slopes_have_the_sign_that_the_loss_promises(loss):
    """Chosen up and rejected down lower the loss; APO-down lowers both; IPO and hinge have a margin to reach."""
    pairs = many_pairs()
    chosen, rejected = slopes_of(loss, pairs, 0.3)
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
    else:
        assert (chosen < 0).all() and (rejected > 0).all()


@given(ratio=st.floats(-1e4, 1e4), other=st.floats(-1e4, 1e4), beta=st.floats(1e-3, 10))
def test_losses_and_slopes_stay_finite_far_from_the_reference(ratio, other, beta):
    pairs = scores((-1e5 + ratio, -1e5 + other, -1e5, -1e5, 3, 7))
    for loss in LOSSES:
        assert torch.isfinite(LOSSES[loss].function(pairs, beta, 0.1)).all(), loss
        assert all(torch.isfinite(slope).all() for slope in slopes_of(loss, pairs, beta, 0.1)), loss


@given(margin=st.floats(-20, 20), beta=st.floats(0.01, 5), smoothing=st.floats(0.01, 0.45))
def test_swapping_chosen_and_rejected_turns_the_margin_round(margin, beta, smoothing):
    """Conservative DPO mixes the two; robust DPO is its inverse: mixing robust losses gives plain DPO back."""
    there, back = scores((margin, 0, 0, 0, 2, 2)), scores((0, margin, 0, 0, 2, 2))
    plain = [LOSSES["sigmoid"].function(pairs, beta, 0.0) for pairs in (there, back)]
    mixed = LOSSES["sigmoid"].function(there, beta, smoothing)
    torch.testing.assert_close(mixed, (1 - smoothing) * plain[0] + smoothing * plain[1], rtol=1e-12, atol=1e-12)
    robust = [LOSSES["robust"].function(pairs, beta, smoothing) for pairs in (there, back)]
    torch.testing.assert_close((1 - smoothing) * robust[0] + smoothing * robust[1], plain[0], rtol=1e-10, atol=1e-10)


def test_noise_in_the_score_biases_the_sigmoid_loss_by_at_most_an_eighth_of_its_variance():
    """The bound that docs and metrics cite: the second derivative of -log sigma is at most 1/4."""
    for score in np.linspace(-6, 6, 25):
        for spread in (0.1, 1.0, 3.0):
            noisy = torch.tensor([score - spread, score + spread], dtype=torch.float64)  # variance spread^2
            loss = -torch.nn.functional.logsigmoid(noisy).mean().item()
            bias = loss - math.log1p(math.exp(-score))
            assert 0 <= bias <= spread**2 / 8 + 1e-15
