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
    """Attention of one prompt's part of a row. Masks are True where a key is seen; `pads` number the draws' tokens.

    `prompt` [P, P]; per response: `clean` [C, P + C], `noisy` [draws, 1, N, P + C + N] for draws padded to N tokens,
    `places` [draws, N] of their tokens among all of the response's draws, `is_real` [draws * N] (None: no padding).
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
        sizes = (context.prompt, *context.clean, *map(sum, context.noisy))
        prompt, *rest = blocks.split(sizes)
        responses = len(context.clean)
        part = cls(context, block_causal(prompt, prompt), [], [], [], [])
        for clean, noisy, counts in zip(rest[:responses], rest[responses:], context.noisy, strict=True):
            seen = torch.cat([prompt, clean])
            part.clean.append(block_causal(clean, seen))
            part._add_draws(seen, noisy, counts)
        return part

    def _add_draws(self, seen: Tensor, noisy: Tensor, counts: Sequence[int]) -> None:
        device, longest = noisy.device, max(counts)
        lengths = torch.tensor(counts, device=device)[:, None]
        within = torch.arange(longest, device=device).expand(len(counts), -1)
        is_real = within < lengths
        places = lengths.cumsum(0) - lengths + torch.where(is_real, within, 0)  # pads repeat a draw's first token
        blocks = noisy[places]  # [draws, N]
        own = (blocks[:, None] == blocks[..., None]) & is_real[:, None]
        before = seen < blocks[..., None]
        self.noisy.append(torch.cat([before, own], dim=-1)[:, None])
        self.places.append(places)
        self.is_real.append(None if min(counts) == longest else is_real.flatten())


@dataclass(frozen=True)
class SharedLayout:
    """The parts of a row, one for each prompt."""

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
    context, responses = part.context, len(part.clean)
    sizes = (context.prompt, *context.clean, *map(sum, context.noisy))
    segments = list(zip(*(x.split(sizes) for x in (query, key, value)), strict=True))
    prompt = segments[0]
    outputs = [call(*(x[None] for x in prompt), part.prompt[None, None])[0]] if context.prompt else []

    seen = []  # keys and values of the prompt and each clean response
    for mask, (clean, *own) in zip(part.clean, segments[1 : 1 + responses], strict=True):
        seen.append([torch.cat([shared, mine]) for shared, mine in zip(prompt[1:], own, strict=True)])
        if len(clean):
            outputs.append(call(clean[None], *(x[None] for x in seen[-1]), mask[None, None])[0])

    drawn = zip(part.noisy, part.places, part.is_real, segments[1 + responses :], seen, strict=True)
    for mask, places, is_real, noisy, clean in drawn:
        query, *own = (x if is_real is None else x[places.flatten()] for x in noisy)
        draws = (len(places), -1)
        keys = [
            torch.cat([shared.expand(len(places), *shared.shape), mine.unflatten(0, draws)], dim=1)
            for shared, mine in zip(clean, own, strict=True)
        ]
        output = call(query.unflatten(0, draws), *keys, mask).flatten(0, 1)
        outputs.append(output if is_real is None else output[is_real])
    return outputs
