"""Attention, padded or packed, behind the attention interface of transformers.

Padded input is given to the implementation the model's config names (sdpa, eager, flash_attention_2, flex_attention).
Packed input (sequences laid end to end, no padding) takes one of two exact routes: one call of a variable-length
kernel, or one batched call for each set of neighbours of equal length. Neither ever builds a mask, but for the blocks
of a block-diffusion model (laddpo/models/block_attention.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from laddpo.errors import UserError
from laddpo.models.block_attention import SharedLayout, block_causal

try:  # new in torch 2.10; a CUDA kernel for float16 and bfloat16
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover - depends on the torch build
    varlen_attn = None


@dataclass
class PackedLayout:
    """Where each of the packed sequences lies. `lengths` in tokens, in order; `offsets` int32 [sequences + 1];
    `block_length` of a block-diffusion model, whose positions count from 0 in each sequence."""

    lengths: list[int]
    offsets: Tensor | None = None
    block_length: int | None = None
    runs: list[tuple[int, int, int]] = field(init=False)  # (first token, sequences, tokens of each)

    def __post_init__(self):
        self.runs, start = [], 0
        for length, same in groupby(self.lengths):
            count = len(list(same))
            self.runs.append((start, count, length))
            start += count * length

    @classmethod
    def build(
        cls, lengths: list[int], route: str, device: torch.device, block_length: int | None = None
    ) -> PackedLayout:
        """The layout for a route ("flash", "varlen" or "batched"); the first two need `offsets` on the device."""
        if route == "batched":
            return cls(list(lengths), block_length=block_length)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(list(lengths), ends.to(device, non_blocking=True))


def varlen_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the variable-length kernel cannot serve this device and dtype, or None when it can."""
    if varlen_attn is None:
        return "this torch has no torch.nn.attention.varlen"
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def length_order(lengths: list[int]) -> list[int] | None:
    """An order of the sequences in which equal lengths are neighbours, or None when they already are."""
    if sum(1 for _ in groupby(lengths)) == len(set(lengths)):
        return None
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def token_order(lengths: list[int], order: list[int]) -> Tensor:
    """Indices of the tokens when the sequences are put in `order`. # int64 [T]

    Example: lengths [2, 1, 2] in order [1, 0, 2] -> [2, 0, 1, 3, 4].
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])


def attend(
    block, query: Tensor, key: Tensor, value: Tensor, mask, layout: PackedLayout | SharedLayout | None
) -> Tensor:
    """Attention output of one block. query [B, L, heads, head_dim], key and value with their own heads -> like query.

    With `layout`, B is 1 and each sequence attends within itself, or as the contexts say.
    """
    attention = block.config._attn_implementation
    if isinstance(layout, SharedLayout):
        return layout.attend(partial(_interface, block), query, key, value)
    if layout is None:
        return _interface(block, query, key, value, mask)
    if attention.startswith("flash"):
        longest = max(layout.lengths)
        bounds = {"cu_seq_lens_q": layout.offsets, "cu_seq_lens_k": layout.offsets}
        return _interface(block, query, key, value, None, **bounds, max_length_q=longest, max_length_k=longest)
    if layout.offsets is not None:
        return _varlen(block, query, key, value, layout)
    return _by_runs(block, query, key, value, layout)


def _interface(block, query: Tensor, key: Tensor, value: Tensor, mask, **kwargs) -> Tensor:
    call = ALL_ATTENTION_FUNCTIONS.get_interface(block.config._attn_implementation, eager_attention)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    dtype = query.dtype
    is_widened = query.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", enabled=False) if is_widened else nullcontext():
        if is_widened:  # the backward pass of torch's CPU kernel is slower in bfloat16 than in float32
            query, key, value = (x.float() for x in (query, key, value))
        out, _ = call(block, query, key, value, mask, dropout=0.0, scaling=block.scaling, is_causal=False, **kwargs)
    return out.to(dtype)  # [B, L, heads, head_dim]


def _varlen(block, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
    groups, longest = block.num_key_value_groups, max(layout.lengths)
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    query, key, value = (x.squeeze(0) for x in (query, key, value))  # [0] would go back through a tensor of zeros
    out = varlen_attn(query, key, value, layout.offsets, layout.offsets, longest, longest)
    return out[None]


def _by_runs(block, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
    # split, not slices: each slice's gradient would be a whole tensor of zeros but for the slice
    sizes = [count * length for _, count, length in layout.runs]
    split = (x.squeeze(0).split(sizes) for x in (query, key, value))
    outputs = []
    for (_, count, length), *parts in zip(layout.runs, *split, strict=True):
        parts = (part.unflatten(0, (count, length)) for part in parts)
        mask = None
        if layout.block_length:
            blocks = torch.arange(length, device=query.device) // layout.block_length
            mask = block_causal(blocks, blocks)[None, None]
        outputs.append(_interface(block, *parts, mask).flatten(0, 1))
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).unsqueeze(0)


def eager_attention(block, query, key, value, mask, scaling: float, dropout: float = 0.0, **_):
    """Plain attention, softmax in float32 or wider; returns the probabilities too. Heads before positions."""
    if dropout:
        raise UserError(f"attention dropout is {dropout}; expected 0: a policy with dropout has no exact ELBO margin.")
    groups = block.num_key_value_groups
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=wide).to(query.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities
