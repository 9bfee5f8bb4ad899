"""The vocabulary head on chosen rows: log-probabilities of given tokens without the logits of all tokens.

In: hidden states of the masked rows, the head's weight, the true tokens. Out: log p(token) per row, in float32 (float64
for a float64 model). The logits of one chunk of rows live at a time, forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}  # logits of one chunk: fits the cache (cpu), feeds the cores (cuda)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None) -> Tensor:
    """log p(targets[i]) under softmax(hidden[i] @ weight.T). hidden [M, D], weight [V, D], targets [M] -> [M].

    `chunk_rows`: rows whose logits are held together; fewer need less memory and change no value beyond rounding.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    if chunk_rows is None:
        chunk_rows = max(64, CHUNK_ELEMENTS.get(device, 2**23) // len(weight))
    with torch.autocast(device, enabled=False):
        return _TokenLogps.apply(hidden.contiguous(), weight, targets, chunk_rows)


def chunk_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits in float32 or wider. On CUDA the product itself leaves in float32: rounding logits of size 20 to bfloat16
    would move a log-probability by up to 0.06. # [rows, V]"""
    if hidden.is_cuda and torch.version.cuda is not None and hidden.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    logits = hidden @ weight.t()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _TokenLogps(torch.autograd.Function):
    """d log p_i / d hidden_i = weight[target_i] - softmax_i @ weight depends on no later gradient except as a factor of
    the row, so the forward pass computes it while the chunk's softmax is at hand; only a trainable head recomputes."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        slopes = torch.empty_like(hidden) if needs_hidden else None
        for rows in _chunks(len(hidden), chunk_rows):
            chosen = targets[rows, None]
            logps[rows], residual = _score(chunk_logits(hidden[rows], weight), chosen, needs_hidden)
            if needs_hidden:
                slopes[rows] = residual.to(hidden.dtype) @ weight
            del residual  # or two chunks would live at once
        ctx.chunk_rows = chunk_rows
        ctx.save_for_backward(slopes, *((hidden, weight, targets) if needs_weight else (None, None, None)))
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        slopes, hidden, weight, targets = ctx.saved_tensors
        grad_hidden = slopes * grad[:, None].to(slopes.dtype) if slopes is not None else None
        grad_weight = None
        if weight is not None:
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for rows in _chunks(len(hidden), ctx.chunk_rows):
                _, residual = _score(chunk_logits(hidden[rows], weight), targets[rows, None], True)
                residual *= grad[rows, None]
                grad_weight += residual.to(hidden.dtype).t() @ hidden[rows]
                del residual
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _score(logits: Tensor, chosen: Tensor, wants_residual: bool) -> tuple[Tensor, Tensor]:
    """log softmax at the chosen tokens [rows]; `logits` [rows, V], overwritten by one-hot(chosen) - softmax if wanted.

    One exponential and no second [rows, V] tensor: logsumexp would make one of its own.
    """
    top = logits.amax(-1, keepdim=True)
    above = logits.gather(1, chosen) - top
    exponentials = logits.sub_(top).exp_()
    total = exponentials.sum(-1, keepdim=True)
    if wants_residual:
        exponentials.div_(-total).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=total.dtype))
    return (above - total.log())[:, 0], exponentials


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
