"""Attention of block-diffusion models: causal over blocks, both ways inside one, and rows whose draws share a context.

A token's block is its position divided by the block length. In a shared row (laddpo/core/sequences.py) a noisy block
sees the clean blocks before it and itself. Each draw is an entry of a batch over the same clean keys: the cost is
linear in the draws, where one mask over the whole row would make it quadratic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laddpo.core.sequences import Context


def block_causal(query_blocks: Tensor, key_blocks: Tensor) -> Tensor:
    """What clean tokens see: their own block and those before it. [..., Q], [..., K] -> bool [..., Q, K]"""
    return key_blocks[..., None, :] <= query_blocks[..., :, None]


@dataclass(frozen=True)
class SharedPart:
    """Attention of the prompts of one shape. Masks are True where a key is seen; P, C: tokens of a prompt, of a clean
    response; D: draws of a response over all prompts, padded to N tokens.

    `prompt` [1, 1, P, P]; per response: `clean` [1, 1, C, P + C], `noisy` [D, 1, N, P + C + N], `places` [D, N] of the
    draws' tokens in their segment, `is_real` [D * N] (None: no padding).
    """

    context: Context
    prompt: Tensor
    clean: list[Tensor]
    noisy: list[Tensor]
    places: list[Tensor]
    is_real: list[Tensor | None]

    @classmethod
    def build(cls, context: Context, blocks: Tensor) -> SharedPart:
        """`blocks`: the block of every token of this part. # [tokens]"""
        prompt, *rest = blocks.split(context.segments)
        prompt, sides = prompt[: context.prompt], len(context.clean)
        part = cls(context, block_causal(prompt, prompt)[None, None], [], [], [], [])
        for clean, tokens, noisy, counts in zip(rest, context.clean, rest[sides:], context.noisy, strict=False):
            seen = torch.cat([prompt, clean[:tokens]])
            part.clean.append(block_causal(clean[:tokens], seen)[None, None])
            part._add_draws(seen, noisy, counts)
        return part

    def _add_draws(self, seen: Tensor, noisy: Tensor, counts: Sequence[int]) -> None:
        device, longest = noisy.device, max(counts)
        lengths = torch.tensor(counts, device=device)[:, None]
        within = torch.arange(longest, device=device).expand(len(counts), -1)
        is_real = within < lengths
        places = lengths.cumsum(0) - lengths + torch.where(is_real, within, 0)  # pads repeat a draw's first token
        blocks = noisy[places]  # [D, N]
        own = (blocks[:, None] == blocks[..., None]) & is_real[:, None]
        before = seen < blocks[..., None]
        self.noisy.append(torch.cat([before, own], dim=-1)[:, None])
        self.places.append(places)
        self.is_real.append(None if min(counts) == longest else is_real.flatten())


@dataclass(frozen=True)
class SharedLayout:
    """The parts of a row, one for each shape of prompts."""

    parts: list[SharedPart]

    @classmethod
    def build(cls, contexts: Sequence[Context], position_ids: Tensor, block_length: int) -> SharedLayout:
        """The layout of a row. position_ids [T]"""
        blocks = (position_ids // block_length).split([context.tokens for context in contexts])
        return cls([SharedPart.build(context, own) for context, own in zip(contexts, blocks, strict=True)])

    def attend(self, call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output of a row. query [1, T, heads, head_dim]; `call` attends [B, L, heads, head_dim] under a mask
        [B or 1, 1, Q, K]. # like query"""
        sizes = [part.context.tokens for part in self.parts]
        # split, not slices: each slice's gradient would be a whole tensor of zeros but for the slice
        rows = zip(self.parts, *(x.squeeze(0).split(sizes) for x in (query, key, value)), strict=True)
        outputs = [output for part, *qkv in rows for output in _attend_part(call, part, *qkv)]
        return torch.cat(outputs).unsqueeze(0)


def _attend_part(call, part: SharedPart, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Outputs of the segments of a part, in their order. [tokens, heads, head_dim] each"""
    context, sides = part.context, len(part.clean)
    segments = list(zip(*(x.split(context.segments) for x in (query, key, value)), strict=True))
    sizes = (context.prompt, *context.clean)
    by_prompt = [
        [x.unflatten(0, (context.prompts, n)) for x in segment]
        for n, segment in zip(sizes, segments[: 1 + sides], strict=True)
    ]
    prompt = by_prompt[0]
    outputs = [call(*prompt, part.prompt)] if context.prompt else []

    seen = []  # keys and values of the prompts with each clean response
    for mask, (clean, *own) in zip(part.clean, by_prompt[1:], strict=True):
        seen.append([torch.cat([shared, mine], dim=1) for shared, mine in zip(prompt[1:], own, strict=True)])
        if clean.shape[1]:
            outputs.append(call(clean, *seen[-1], mask))
    outputs = [output.flatten(0, 1) for output in outputs]

    drawn = zip(part.noisy, part.places, part.is_real, segments[1 + sides :], seen, strict=True)
    for mask, places, is_real, noisy, clean in drawn:
        query, *own = (x if is_real is None else x[places.flatten()] for x in noisy)
        draws = len(places) // context.prompts  # of each prompt
        keys = [
            torch.cat([shared.repeat_interleave(draws, dim=0), mine.unflatten(0, places.shape)], dim=1)
            for shared, mine in zip(clean, own, strict=True)
        ]
        output = call(query.unflatten(0, places.shape), *keys, mask).flatten(0, 1)
        outputs.append(output if is_real is None else output[is_real])
    return outputs
