"""The forward passes of the sampler: logits of the open positions of every item's current block.

Each class has `enter(active)`, called whenever items leave, and `logits(...)`, called once a step. In a bidirectional
model a step needs the whole sequence, or some of it from a cache that is not exact. In a block model nothing before the
block changes any more, so its keys and values are kept and a step runs the block alone.

An item's canvas is what is being written. In a block model it begins where the block of the grid begins that holds the
first token of the answer, so its first columns may be the last tokens of the prompt. Shapes: A active items, W columns
of the canvas, s positions of a block, R open positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laddpo.models.block_cache import BlockCache, GridCache
from laddpo.models.sharding import is_sharded


class WholeSequences:
    """Every step runs prompt and answer of every active item, packed without padding.

    `free` is a second pass that sees masks instead of the prompt, for guidance.
    """

    def __init__(self, model, prompts: Sequence[Tensor], width: int, free: Sequence[Tensor] = ()):
        self.model, self.prompts, self.free, self.width = model, prompts, free, width

    def enter(self, active: list[int]) -> None:
        """Lay out the packed input of the items that are still being written."""
        device = self.prompts[0].device
        self.passes = [[of[i] for i in active] for of in (self.prompts, self.free) if len(of)]
        self.lengths = [len(p) + self.width for group in self.passes for p in group]
        self.positions = torch.cat([torch.arange(n) for n in self.lengths])[None].to(device)
        ends = torch.tensor(self.lengths[: len(active)]).cumsum(0)
        self.first = (ends - self.width)[:, None].to(device)  # where each answer begins in the packed row [A, 1]
        self.tokens_per_pass = int(ends[-1])

    def logits(self, canvas: Tensor, columns: Tensor, is_first: list[bool], is_open: Tensor) -> Tensor:
        """Of `canvas` [A, W] at the open ones of the `columns` [A, s]. # [R, V], of both passes one below the other"""
        ids = torch.cat([part for group in self.passes for pair in zip(group, canvas, strict=True) for part in pair])
        rows = (self.first + columns)[is_open]
        if self.free:
            rows = torch.cat([rows, rows + self.tokens_per_pass])
        packed = {"input_ids": ids[None], "position_ids": self.positions, "lengths": self.lengths}
        return self.model(**packed, rows=rows).logits


class PartlyKept:
    """The same from kept keys and values, renewed by the first step of every block."""

    def __init__(self, model, prompts: Sequence[Tensor], width: int, free: Sequence[Tensor], block: int, kind: str):
        self.caches = [BlockCache(model, group, width, block, kind) for group in (prompts, free) if len(group)]

    def enter(self, active: list[int]) -> None:
        self.active = active

    def logits(self, canvas: Tensor, columns: Tensor, is_first: list[bool], is_open: Tensor) -> Tensor:
        items = torch.tensor(self.active, device=canvas.device)
        renewed = torch.tensor(is_first, device=canvas.device)
        hidden = [cache.hidden(items, canvas, columns[:, 0], renewed)[is_open] for cache in self.caches]
        return self.caches[0].logits(torch.cat(hidden))


class KeptBlocks:
    """For a block model: a step runs the current block of every active item against the kept keys and values of all
    that precedes it. Those of a block are kept when it is full: exactly what the whole sequence would give."""

    def __init__(self, model, whole: Sequence[Tensor], width: int):
        self.cache = GridCache(model, whole, width)

    def enter(self, active: list[int]) -> None:
        self.active = active

    def logits(self, canvas: Tensor, columns: Tensor, is_first: list[bool], is_open: Tensor) -> Tensor:
        starts = columns[:, 0].tolist()
        filled = [at for at, (start, first) in enumerate(zip(starts, is_first, strict=True)) if first and start]
        if filled:
            before = canvas[filled].gather(1, columns[filled] - columns.shape[1])
            self.cache.run([self.active[i] for i in filled], before, [starts[i] - columns.shape[1] for i in filled])
        return self.cache.model.logits(self.cache.run(self.active, canvas.gather(1, columns), starts)[is_open])


class WholeBlocks:
    """The same by the plain forward over everything up to the current block: for sharded weights, which only a whole
    forward puts together."""

    def __init__(self, model, whole: Sequence[Tensor]):
        self.model, self.whole = model, whole

    def enter(self, active: list[int]) -> None:
        self.active = active

    def logits(self, canvas: Tensor, columns: Tensor, is_first: list[bool], is_open: Tensor) -> Tensor:
        parts = [
            torch.cat([self.whole[item], row[:end]])
            for item, row, end in zip(self.active, canvas, (columns[:, -1] + 1).tolist(), strict=True)
        ]
        lengths = [len(part) for part in parts]
        ends = torch.tensor(lengths, device=canvas.device).cumsum(0)[:, None]
        rows = (ends - columns.shape[1] + torch.arange(columns.shape[1], device=canvas.device))[is_open]
        positions = torch.cat([torch.arange(n, device=canvas.device) for n in lengths])
        packed = {"input_ids": torch.cat(parts)[None], "position_ids": positions[None], "lengths": lengths}
        return self.model(**packed, rows=rows).logits


def passes_for(model, prompts: list[Tensor], width: int, settings, mask: int):
    """How the logits of these prompts are computed. `width`: columns of the canvas."""
    if size := model.block_length:
        whole = [p[: len(p) // size * size] for p in prompts]
        return WholeBlocks(model, whole) if is_sharded(model) else KeptBlocks(model, whole, width)
    free = [torch.full_like(p, mask) for p in prompts] if settings.cfg_scale > 0 else []
    if settings.block_cache == "none":
        return WholeSequences(model, prompts, width, free)
    return PartlyKept(model, prompts, width, free, settings.block_length, settings.block_cache)
