"""Values and slopes of every loss that TRL has, against TRL's own code on random numbers.

TRL's trainers are called with stand-ins for the model: log-probabilities go in, its loss comes out. Install the extra
`trl` for these tests; they are written for its version.
"""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from laddpo.core.losses import (
    LOSSES,
    CompletionScores,
    LossOptions,
    PairScores,
    completion_loss,
    preference_loss,
)

trl = pytest.importorskip("trl", reason="compares with TRL: pip install 'laddpo[trl]'")
PAIRS = 6
BETA = 0.07
OF_DPO = [name for name, row in LOSSES.items() if row.takes_pairs and row.needs_reference and name != "dpop"]
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


@pytest.fixture(autouse=True)
def wide():
    """TRL makes some constants of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(seed: int = 0) -> torch.Tensor:
    """B_w, B_l, R_w, R_l in nats and L_w, L_l in tokens. # float64 [6, pairs]"""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.uniform(-30, -1, (4, PAIRS)), rng.integers(1, 9, (2, PAIRS))])
    return torch.tensor(values, dtype=torch.float64)


def per_token(logps: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the completion mask after one prompt token, log-probabilities of the tokens): equal shares, then padding."""
    lengths = tokens.int().tolist()
    longest = max(lengths)
    mask = torch.tensor([[0] + [1] * n + [0] * (longest - n) for n in lengths])
    return mask, logps[:, None] / tokens[:, None] * mask[:, 1:]


def outputs_of(values: torch.Tensor) -> SimpleNamespace:
    """What a model gives to TRL."""
    zeros = torch.zeros_like(values)
    return SimpleNamespace(log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def itself(**fields) -> SimpleNamespace:
    """What both trainers look at beside their loss."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def dpo_trainer(loss: str, pairs: PairScores, options: LossOptions) -> torch.Tensor:
    """DPOTrainer: the mean loss of the pairs."""
    from trl.trainer.dpo_trainer import DPOTrainer

    logps = torch.cat([pairs.policy_chosen, pairs.policy_rejected])
    mask, values = per_token(logps, torch.cat([pairs.chosen_tokens, pairs.rejected_tokens]))
    trainer = itself(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        use_weighting=False,
        label_smoothing=options.label_smoothing,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": pairs.reference_chosen,
        "ref_rejected_logps": pairs.reference_rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs_of(values), inputs, return_outputs=False)


def cpo_trainer(loss: str, pairs: PairScores, options: LossOptions) -> torch.Tensor:
    """CPOTrainer, as its get_batch_loss_metrics puts its parts together; simpo with per-token log-probabilities.

    TRL's likelihood term is a mean over the tokens of a batch, here of a batch of one pair.
    """
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=ACCELERATOR,
        beta=options.beta,
        loss_type="sigmoid" if loss == "cpo" else loss,
        simpo_gamma=options.simpo_gamma,
        label_smoothing=options.label_smoothing,
    )
    chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
    if loss == "simpo":
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    alpha = options.cpo_alpha if loss == "cpo" else 0.0
    losses, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    return (losses - alpha * pairs.policy_chosen / pairs.chosen_tokens).mean()


def orpo_trainer(loss: str, pairs: PairScores, options: LossOptions) -> torch.Tensor:
    """ORPOTrainer, as its get_batch_loss_metrics puts its parts together."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=options.beta)
    chosen, rejected = pairs.policy_chosen / pairs.chosen_tokens, pairs.policy_rejected / pairs.rejected_tokens
    ratios, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    return -chosen.mean() - ratios.mean()


# TRL's sigmoid and sigmoid_norm ignore label smoothing, ours does not; its odds ratio is computed in float32
SMOOTHED = ("robust", "exo_pair", "simpo", "cpo")
OF_PAIRS = {
    **dict.fromkeys(OF_DPO, (dpo_trainer, 1e-12)),
    "simpo": (cpo_trainer, 1e-12),
    "cpo": (cpo_trainer, 1e-12),
    "orpo": (orpo_trainer, 1e-5),
}


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_values_and_slopes_of_pairs_equal_those_of_trl(loss):
    theirs, tolerance = OF_PAIRS[loss]
    smoothing = 0.2 if loss in SMOOTHED else 0.0
    options = LossOptions(BETA, label_smoothing=smoothing, simpo_gamma=0.3, cpo_alpha=0.7)
    found = {}
    for name in ("ours", "trl"):
        numbers = rows()
        policy = numbers[:2].clone().requires_grad_()
        pairs = PairScores(*policy, *numbers[2:])
        value = preference_loss(loss, pairs, options).mean() if name == "ours" else theirs(loss, pairs, options)
        found[name] = value, torch.autograd.grad(value, policy)[0]
    for ours, trls in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, trls, rtol=tolerance, atol=1e-3 * tolerance)
    assert (found["ours"][1] != 0).any()


def kto_trainer(loss: str, scores: CompletionScores, options: LossOptions, shift: torch.Tensor) -> torch.Tensor:
    """KTOTrainer: the mean loss of the completions. `shift`: ratios of mismatched completions."""
    from trl.trainer.kto_trainer import KTOTrainer

    mask, values = per_token(scores.policy, scores.tokens)
    trainer = itself(
        loss_type=loss,
        calculate_KL=loss == "kto",
        desirable_weight=options.desirable_weight,
        undesirable_weight=options.undesirable_weight,
        _compute_kl_logps=lambda model, batch: batch["ref_KL_logps"] + shift,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": scores.labels,
        "ref_logps": scores.reference,
        "ref_KL_logps": torch.linspace(-20, -10, len(shift)),
    }
    return KTOTrainer._compute_loss(trainer, lambda **_: outputs_of(values), inputs, return_outputs=False)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", ["mixed", "desirable", "undesirable"])
@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_values_and_slopes_of_single_completions_equal_those_of_trl(loss, labels, shift):
    """The baseline is the mean ratio of mismatched completions, held at 0 or above."""
    options = LossOptions(BETA, desirable_weight=1.3, undesirable_weight=0.6)
    ratios = torch.linspace(-1, 1, PAIRS) + shift
    mixed = [True, False, True, True, False, False]
    flags = {"mixed": mixed, "desirable": [True] * PAIRS, "undesirable": [False] * PAIRS}[labels]
    found = {}
    for name in ("ours", "trl"):
        numbers = rows(1)
        policy = numbers[0].clone().requires_grad_()
        scores = CompletionScores(policy, numbers[2], torch.tensor(flags), numbers[4])
        if name == "ours":
            value = completion_loss(loss, scores, options, ratios.mean().clamp(min=0)).mean()
        else:
            value = kto_trainer(loss, scores, options, ratios)
        found[name] = value, torch.autograd.grad(value, policy)[0]
    for ours, trls in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, trls, rtol=1e-12, atol=1e-15)


def test_every_loss_but_dpop_is_compared():
    assert set(OF_PAIRS) | {"kto", "apo_zero_unpaired", "dpop"} == set(LOSSES)
