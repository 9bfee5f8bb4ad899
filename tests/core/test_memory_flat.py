"""What a step allocates does not grow with the number of draws, and is a small share of what others allocate.

Bytes, not seconds: counted on allocations (hardware/measuring.py), on a model small enough to be quick.
"""

import numpy as np
import pytest
import torch

from laddpo.benchmarking.contenders import Ours, build_contenders
from laddpo.benchmarking.measure import pass_peaks, step_peak
from laddpo.benchmarking.workload import longest_sequence, pair_of_tokens, random_pairs
from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import accumulate_gradient
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective
from laddpo.hardware.measuring import peak_bytes
from laddpo.inputs.reference_values import fill_reference
from laddpo.models.adapters import attach_lora, trainable_parameters
from laddpo.models.blocks import checkpoint_blocks
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.head import token_logps
from laddpo.models.llada_config import LLaDAConfig
from laddpo.models.loading import new_config, new_model
from laddpo.processes.signals import StopFlag
from laddpo.storage.reference_store import ReferenceStore
from tests.core.helpers import referenced_items
from tests.core.test_memory import FAMILY_SHAPES

VOCABULARY, MASK, PAD = 4096, 4095, 4094
TOKENS = 64  # of a sequence


@pytest.fixture(scope="module")
def model():
    """2 blocks of width 32 under a vocabulary of 4,096, with an adapter."""
    shape = {"d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 96, "max_sequence_length": 512}
    model = new_model(LLaDAConfig(**shape, vocab_size=VOCABULARY, mask_token_id=MASK), seed=0)
    attach_lora(model, r=1, seed=0)
    return model


@pytest.fixture(scope="module")
def pairs():
    """Responses long enough that one draw's count does not decide the peak: the head works in chunks of its rows."""
    return [pair_of_tokens(TOKENS, PAD, seed, prompt_share=0.2) for seed in range(2)]


def ours(model, budget: int, mode: str = "stream", chunk: int | None = 8) -> Ours:
    return Ours(model, TransformerDenoiser(model, MASK, head_chunk=chunk), mode, budget)


@pytest.mark.parametrize(
    ("budget", "fewest", "most"), [(TOKENS, 1, 64), (8 * TOKENS, 8, 64)], ids=["one sequence", "several"]
)
def test_no_pass_takes_more_memory_with_64_draws(model, pairs, budget, fewest, most):
    few, many = (pass_peaks(ours(model, budget), pairs, draws) for draws in (fewest, most))
    for name in ("policy", "margin", "reference"):
        assert many[name] <= 1.05 * few[name], name


@pytest.mark.parametrize(
    "architecture", ["DreamModel", "LLaDAMoEModelLM", "A2DQwen3LMHeadModel"]
)  # the others are alike
def test_no_pass_of_any_family_takes_more_memory_with_more_draws(pairs, architecture):
    sizes = {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 96}
    shape = {**sizes, "vocab_size": VOCABULARY, "max_sequence_length": 512, **FAMILY_SHAPES[architecture]}
    model = new_model(new_config(architecture, shape, mask_token_id=MASK), 0, architecture)
    attach_lora(model, r=1, seed=0)
    few, many = (pass_peaks(ours(model, 8 * TOKENS), pairs, draws) for draws in (8, 32))
    for name in ("policy", "margin", "reference"):
        assert many[name] <= 1.05 * few[name], name


@pytest.mark.parametrize(("loss", "sft_weight"), [("sigmoid", 0.0), ("apo_zero", 0.3)], ids=["1 buffer", "2 buffers"])
def test_checkpointing_is_flat_too_whatever_buffers_the_loss_needs(model, pairs, loss, sft_weight):
    objective = DpoObjective(loss, LossOptions(beta=0.1, sft_weight=sft_weight))
    denoiser = TransformerDenoiser(model, MASK, head_chunk=8)
    parameters = list(trainable_parameters(model).values())
    peaks = {}
    checkpoint_blocks(model)
    try:
        for draws in (1, 32):
            items = referenced_items(denoiser, pairs[:1], ElboEstimator(diffusion_samples=draws))
            model.zero_grad()
            with peak_bytes("cpu") as peak:
                accumulate_gradient(denoiser, parameters, items, objective, 1.0, TOKENS)
            peaks[draws] = peak.above
    finally:
        checkpoint_blocks(model, enabled=False)
    assert peaks[32] <= 1.05 * peaks[1]


def test_two_pass_is_flat_and_joint_is_what_grows(model, pairs):
    peaks = {
        (mode, draws): step_peak(ours(model, TOKENS, mode), model, pairs, draws).above
        for mode in ("two_pass", "joint")
        for draws in (1, 16)
    }
    assert peaks["two_pass", 16] <= 1.05 * peaks["two_pass", 1]
    assert peaks["joint", 16] > 8 * peaks["joint", 1], "the reference mode keeps every graph: the meter sees growth"


def test_filling_the_reference_store_is_flat(model, pairs, tmp_path):
    denoiser = TransformerDenoiser(model, MASK, head_chunk=8)
    peaks = {}
    for draws in (1, 64):
        store = ReferenceStore.open(tmp_path / str(draws), {"draws": draws})
        estimator = ElboEstimator(diffusion_samples=draws)
        windows = [(pairs, estimator.draw_indices(0))]
        with peak_bytes("cpu") as peak:
            fill_reference(denoiser, store, windows, estimator, TOKENS, StopFlag(), 100, lambda pairs: None)
        peaks[draws] = peak.above
    assert peaks[64] <= 1.05 * peaks[1]


def test_logits_are_never_held_for_all_masked_tokens(model):
    """Ten times the rows, the same peak in the head: only a chunk's logits live at a time."""
    head = model.get_output_embeddings().weight
    peaks = []
    for rows in (64, 640):
        hidden = torch.randn(rows, 32, requires_grad=True)
        with peak_bytes("cpu") as peak:
            token_logps(hidden, head, torch.zeros(rows, dtype=torch.int64), chunk_rows=32).sum().backward()
        peaks.append(peak.above)
    chunk = 32 * VOCABULARY * 4
    assert peaks[1] < peaks[0] + 3 * 640 * 32 * 4 + 10_000
    assert peaks[0] < 1.3 * chunk, "one chunk of logits, not two"


def test_others_take_many_times_the_memory(model):
    """At 8 draws, lengths like HH-RLHF's: public_laddpo at least 20 times ours, trl_like with full logits 15 times."""
    pairs = random_pairs(1, PAD, mean=48, p99=190, prompt_mean=28, max_length=256, seed=5)
    contenders = build_contenders(model, MASK, PAD, max_length=256, token_budget=TOKENS)
    lean = ours(model, longest_sequence(pairs), chunk=None)
    least = step_peak(lean, model, pairs, 8).above
    assert step_peak(contenders["public_laddpo"], model, pairs, 8).above >= 20 * least
    assert step_peak(contenders["trl_like (full logits)"], model, pairs, 8).above >= 15 * least
    assert step_peak(contenders["trl_like (chunked logits)"], model, pairs, 8).above > 2 * least


def test_the_reference_copy_of_public_laddpo_counts(model, pairs):
    contender = build_contenders(model, MASK, PAD, max_length=TOKENS, token_budget=TOKENS)["public_laddpo"]
    assert contender.extra_bytes >= 4 * sum(p.numel() for p in model.parameters())
    peak = step_peak(contender, model, pairs[:1], 1)
    assert peak.total > 2 * contender.extra_bytes


# The rivals compute what they are said to compute


def test_every_arrangement_of_trl_like_gives_one_loss_and_one_gradient(model, pairs):
    found = []
    contenders = build_contenders(model, MASK, PAD, TOKENS, TOKENS)
    for name in [name for name in contenders if name.startswith("trl_like")]:
        contender = contenders[name]
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                parameter.fill_(0.01 if "lora_B" in name else 0.02)
        contender.prepare(pairs[:1], 3)
        loss = contender.step(pairs[:1], 3)
        found.append((loss, torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()])))
    model.zero_grad()
    assert len(found) == 5
    for loss, gradient in found[1:]:
        assert found[0][0] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(found[0][1], gradient, rtol=1e-3, atol=1e-6)
    assert found[0][1].norm() > 0


def test_trl_like_scores_the_same_masked_rows_as_a_plain_softmax(model, pairs):
    """Its weighted sum over masked tokens, from the model's full logits by hand."""
    rival = build_contenders(model, MASK, PAD, TOKENS, TOKENS)["trl_like (chunked logits)"]
    rows, present, scored, weights = rival._batch(pairs[0], 2)
    noisy = rows.masked_fill(scored, MASK)
    with torch.no_grad():
        logits = model(input_ids=noisy, attention_mask=present.long()).logits
        expected = (logits.log_softmax(-1).gather(-1, rows[..., None])[..., 0] * scored).sum(-1) * weights
        torch.testing.assert_close(rival._row_logps(rows, present, scored, weights), expected, rtol=1e-4, atol=1e-3)
    prompt = len(pairs[0].prompt_ids)
    assert not scored[:, :prompt].any() and scored.any(dim=1).all()


def test_public_laddpo_scores_prompt_and_padding_with_masks_of_its_own(model, pairs):
    rival = build_contenders(model, MASK, PAD, 2 * TOKENS, TOKENS)["public_laddpo"]
    row = rival._padded(pairs[0].prompt_ids, pairs[0].chosen_ids)
    assert row.shape == (1, 2 * TOKENS) and (row[0, TOKENS:] == PAD).all()
    with torch.no_grad():
        first, second = (float(rival._estimate(model, row)) for _ in range(2))
    assert first != second, "every call draws another mask"
    assert np.isfinite([first, second]).all() and first < 0


def test_a_step_of_ours_differs_by_mode_in_memory_alone(model, pairs):
    found = []
    for mode in ("stream", "two_pass", "joint"):
        model.zero_grad()
        contender = ours(model, TOKENS, mode)
        contender.prepare(pairs, 4)
        contender.step(pairs, 4)
        found.append(torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()]))
    model.zero_grad()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)
