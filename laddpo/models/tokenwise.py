"""What a block does to each token by itself, in few passes over memory and with little kept for the backward pass.

Plain autograd reads and writes float32 copies of queries and keys for the rotation, and keeps an MLP-wide tensor that
the backward pass can make again. Values and gradients are those of the plain form to the bit
(tests/models/test_tokenwise.py), and a test counts a block's passes (tests/models/test_block_traffic.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired (not neighbours), in float32 or wider. # like x

    x [..., heads, head_dim]; cos and sin of the angles, float32 [..., 1, head_dim / 2]. arXiv 2104.09864.
    """
    return _Rotation.apply(x, cos, sin)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of which only `gate` and `up` are kept. SwiGLU, arXiv 2002.05202. # like gate"""
    return _GatedProduct.apply(gate, up) if torch.is_grad_enabled() else silu(gate).mul_(up)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the gradient turned back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty_like(x)
    left, right = turned.chunk(2, dim=-1)
    torch.sub(first * cos, second * sin, out=left)  # wide products, rounded once, where they belong
    torch.add(second * cos, first * sin, out=right)
    return turned


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up  # in place, torch 2.11 compiles it to wrong gradients

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, silu(gate).mul_(grad)
