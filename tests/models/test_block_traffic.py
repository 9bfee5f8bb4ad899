"""Bytes that a block of LLaDA-8B's shape moves beside its matrix products: what keeps a fast card waiting for memory.

Counted without weights or values, on the meta device; attention's kernel is left out.
"""

import torch
from torch import nn

from laddpo.models.adapters import attach_lora
from laddpo.models.llada import LLaDAModelLM
from laddpo.models.llada_config import LLaDAConfig
from tests.models.operators import Operators

SHAPE = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "max_sequence_length": 4096}
TOKENS = 4096
PRODUCTS = ("mm", "addmm_")


class FusedNorm(nn.Module):
    """Moves what CUDA's fused norm moves; the meta device would take it apart."""

    class Passes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.add(grad, *ctx.saved_tensors)

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return self.weight * self.Passes.apply(x)


def passes(ran) -> float:
    """Bytes beside matrix products, in hidden states of all tokens."""
    return sum(operator.bytes for operator in ran if operator.name not in PRODUCTS) / (TOKENS * 4096 * 2)


def test_a_block_passes_over_its_activations_no_more_often_than_it_did():
    """As plain autograd, with PEFT's layers: 136 and 153 in 73 and 89 operators."""
    with torch.device("meta"):
        config = LLaDAConfig(**SHAPE, n_layers=1, vocab_size=64, mask_token_id=63)
        model = LLaDAModelLM(config).to(torch.bfloat16)
        attach_lora(model, r=16)
        block = model.model["transformer"]["blocks"][0]
        block.attn_norm, block.ff_norm = FusedNorm(block.attn_norm), FusedNorm(block.ff_norm)
        x = torch.empty(1, TOKENS, 4096, dtype=torch.bfloat16, requires_grad=True)
        rotation = model.rotation(torch.arange(TOKENS)[None], torch.float32)
        with Operators() as forward:
            query, key, value = block.project(x, *rotation)
            out = block.finish(x, value.flatten(2))
        slopes = [torch.empty_like(tensor) for tensor in (out, query, key)]
        with Operators() as backward:
            torch.autograd.backward([out, query, key], slopes)
    assert passes(forward.ran) < 52 and passes(backward.ran) < 108
    assert len(forward.ran) <= 55 and len(backward.ran) <= 97
