"""Memory of a step over shared contexts: as the plan says, and no more for more draws."""

import dataclasses

import numpy as np
import pytest

from laddpo.benchmarking.block import SHARED, BlockLayout
from laddpo.benchmarking.measure import pass_peaks, step_peak
from laddpo.benchmarking.workload import pair_of_tokens
from laddpo.hardware.memory import Load, Setup, predict_memory
from laddpo.hardware.planning import prepared_lengths
from laddpo.hardware.shape import Shape
from laddpo.models import loading
from laddpo.models.adapters import attach_lora
from laddpo.models.blocks import checkpoint_blocks
from laddpo.models.denoiser import TransformerDenoiser

SIZES = {"d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 512, "vocab_size": 2000}
MIB = 2**20


@pytest.fixture(scope="module")
def denoiser():
    config = loading.new_config("SDARForCausalLM", {**SIZES, "max_sequence_length": 512})
    model = loading.new_model(config, 0, "SDARForCausalLM")
    attach_lora(model, r=8)
    return TransformerDenoiser(model, SIZES["vocab_size"] - 1)


def layout(denoiser, budget: int) -> BlockLayout:
    return BlockLayout(denoiser.model, denoiser, "stream", budget, label=SHARED)


@pytest.mark.parametrize(("prompt", "response"), [(80, 80), (480, 20)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_what_the_plan_says(denoiser, checkpointing, prompt, response):
    pair, draws, size = (
        pair_of_tokens(prompt + response, SIZES["vocab_size"] - 2, 0, prompt / (prompt + response)),
        6,
        4,
    )
    ours = layout(denoiser, 10**6)
    (item,) = ours.items([pair], draws)
    rows = sum(len(sequence.draw.masked) for sequence in item.sequences)
    lengths = prepared_lengths(np.array([[prompt, response, response]]), draws, "here", size)
    load = Load(item.tokens, rows, exceeds=False, keys=lengths.keys, seen=lengths.seen)
    setup = Setup(Shape(**SIZES, has_head_norms=True), precision="fp32", device="cpu", rank=8)
    plan = predict_memory(dataclasses.replace(setup, checkpointing=checkpointing), load)

    checkpoint_blocks(denoiser.model, checkpointing)
    measured = step_peak(ours, denoiser.model, [pair], draws).total
    checkpoint_blocks(denoiser.model, False)
    assert plan.peak - plan.parts["optimizer"] == pytest.approx(measured, rel=0.06)


def test_more_draws_take_no_more_memory(denoiser):
    """A micro-step holds the clean part and as many draws as fit beside it, however many there are."""
    pair = pair_of_tokens(60, SIZES["vocab_size"] - 2, seed=1)
    ours = layout(denoiser, 400)
    few, many = (pass_peaks(ours, [pair], draws) for draws in (16, 64))
    for name in few:
        assert many[name] < 1.05 * few[name], (name, few, many)
