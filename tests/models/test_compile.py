"""Compiled blocks: gradients within the stated tolerance of plain ones, the number of compilations bounded."""

import pytest
import torch

from laddpo.core.elbo import draw_logps
from laddpo.models.adapters import adapter_disabled, attach_lora, trainable_parameters
from laddpo.models.blocks import checkpoint_blocks, compile_blocks
from laddpo.models.denoiser import TransformerDenoiser
from tests.core.memory_helpers import masked_sequences

TOLERANCE = 1e-5  # relative, of the whole gradient; stated in compile_blocks and conf/hardware

pytestmark = pytest.mark.slow


def scored(model, lengths: list[int]) -> torch.Tensor:
    denoiser = TransformerDenoiser(model, model.config.mask_token_id)
    return draw_logps(denoiser, masked_sequences(lengths, model.config.vocab_size - 1))


def gradient(model, lengths: list[int]) -> torch.Tensor:
    model.zero_grad()
    scored(model, lengths).sum().backward()
    return torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()])


def test_compilation_moves_values_by_rounding_with_adapter_and_checkpointing(tiny_model, caplog):
    plain, compiled = tiny_model(n_layers=9), tiny_model(n_layers=9)  # more blocks than torch's limit of compilations
    compile_blocks(compiled)
    with torch.no_grad():  # the reference pass comes before the adapter
        for lengths in ([30, 20], [4] * 6, [11]):
            torch.testing.assert_close(scored(compiled, lengths), scored(plain, lengths), rtol=TOLERANCE, atol=0)
    for model in (plain, compiled):
        attach_lora(model, r=2, seed=3)
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                if "lora_B" in name:
                    parameter.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    for lengths in ([30, 40, 30], [20] * 5):
        expected = gradient(plain, lengths)
        assert (gradient(compiled, lengths) - expected).norm() <= TOLERANCE * expected.norm()
    checkpoint_blocks(compiled)
    assert (gradient(compiled, lengths) - expected).norm() <= TOLERANCE * expected.norm()
    with adapter_disabled(plain), adapter_disabled(compiled), torch.no_grad():
        torch.testing.assert_close(scored(compiled, [11]), scored(plain, [11]), rtol=TOLERANCE, atol=0)
    assert not [r for r in caplog.records if "recompile_limit" in r.getMessage()], "blocks fell back to plain execution"
