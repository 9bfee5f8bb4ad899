"""Keys and values that a block-wise sampler keeps while it writes a block.

Bidirectional models (`BlockCache`; Fast-dLLM, arXiv 2505.22618): the first step of every block runs the whole sequence
and stores each layer's keys and values; the later steps run only the block (kind "dual") or the block and what follows
it ("prefix") against the stored rest. The stored rest would have changed a little with every committed token, so
answers differ from those of the full computation, except where every block takes one step.

Block models (`GridCache`): no token sees a later block, so what is kept of finished blocks is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

KINDS = ("prefix", "dual")
PREFILL = 512  # tokens of each prompt that run at once before the first block


class BlockCache:
    """Hidden states of blocks of answers, for a batch of prompts laid out with answers aligned.

    `prompts`: ids of each prompt; `answer_length` G tokens follow each. Items are rows of the batch, in order. Memory:
    2 * layers * kv width for every token, 0.5 MiB a token for an 8B in bfloat16.
    """

    def __init__(self, model, prompts: Sequence[Tensor], answer_length: int, block_length: int, kind: str):
        assert kind in KINDS, f"a block cache is one of {KINDS}, not {kind!r}"
        self.model, self.kind, self.block_length = model, kind, block_length
        device = prompts[0].device
        self.prompt_width = max(len(p) for p in prompts)  # P
        self.width = self.prompt_width + answer_length  # W = P + G: prompts end where answers begin
        pads = [self.prompt_width - len(p) for p in prompts]
        self.pads = torch.tensor(pads, device=device)  # [N]
        self.prompts = torch.stack([nn.functional.pad(p, (pad, 0)) for p, pad in zip(prompts, pads, strict=True)])
        columns = torch.arange(self.width, device=device)
        self.is_real = columns[None] >= self.pads[:, None] if any(pads) else None  # [N, W]
        self.kept = KeptLayers(model, len(prompts), self.width)

    def hidden(self, items: Tensor, answers: Tensor, starts: Tensor, is_first: Tensor) -> Tensor:
        """Final hidden states from which the current block of `items` is scored. # [A, block, D]

        `items` [A] are rows of the batch, `answers` [A, G] what they hold, `starts` [A] where their block begins in the
        answer, `is_first` [A] whether this is the block's first step, which renews what is stored.
        """
        ids = torch.cat([self.prompts[items], answers], dim=1)  # [A, W]
        out = None
        for wanted, columns in ((is_first, self._all), (~is_first, self._open)):
            at = wanted.nonzero()[:, 0]
            if not len(at):
                continue
            where = columns(starts[at])  # [a, Q]
            states = self._run(items[at], ids[at].gather(1, where), where)
            block = self._first(starts[at]) - where[:, :1]  # where the block's scores begin among the columns
            within = block + torch.arange(self.block_length, device=ids.device)
            states = states.gather(1, within[..., None].expand(-1, -1, states.shape[-1]))
            if out is None:
                out = states.new_empty(len(items), *states.shape[1:])
            out[at] = states
        return out

    def _all(self, starts: Tensor) -> Tensor:
        return torch.arange(self.width, device=starts.device).expand(len(starts), -1)

    def _first(self, starts: Tensor) -> Tensor:
        """The column from which the score of a block's first token is read. # [a, 1]"""
        return self.prompt_width + starts[:, None] - self.model.reads_before

    def _open(self, starts: Tensor) -> Tensor:
        """Columns that are computed again: the block, and for "prefix" all that follows. # [a, Q]

        Items at different blocks have different numbers of columns left; the last one is repeated, harmlessly.
        """
        first, before = self._first(starts), self.model.reads_before
        count = self.block_length + before if self.kind == "dual" else self.width - int(first.min())
        return (first + torch.arange(count, device=starts.device)).clamp(max=self.width - 1)

    def _run(self, items: Tensor, ids: Tensor, columns: Tensor) -> Tensor:
        """Run the tokens at `columns` against everything stored, and store their own keys and values. # [a, Q, D]"""
        positions = (columns - self.pads[items, None]).clamp(min=0)
        mask = None if self.is_real is None else self.is_real[items][:, None, None]  # [a, 1, 1, W]
        return self.kept.run(items, ids, positions, columns, mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states. [R, D] -> [R, V]"""
        return self.model.logits(hidden)


class GridCache:
    """Keys and values of a block model: those of finished blocks, and of the block that is being written.

    `whole`: the whole blocks that each prompt begins with. `width` columns follow the longest. A token's column is its
    position, and the items are rows of the batch. Memory as for BlockCache.
    """

    def __init__(self, model, whole: Sequence[Tensor], width: int):
        self.model, self.block_length = model, model.block_length
        assert not model.reads_before, "a block model reads the score of a token at its own place"
        self.first = [len(ids) for ids in whole]  # where the canvas of each item begins
        self.kept = KeptLayers(model, len(whole), max(self.first) + width)
        self._fill(whole)

    def run(self, items: list[int], ids: Tensor, starts: list[int]) -> Tensor:
        """Final hidden states of one block of each of the `items`, which sees all that precedes it. # [a, s, D]

        `ids` [a, s]; `starts` [a]: where the block begins, counted from the end of the prompt's whole blocks. What is
        kept of the block is overwritten.
        """
        device = ids.device
        begins = [self.first[item] + start for item, start in zip(items, starts, strict=True)]
        width = max(begins) + self.block_length
        ends = torch.tensor(begins, device=device)[:, None] + self.block_length  # [a, 1]
        columns = ends - self.block_length + torch.arange(self.block_length, device=device)
        mask = None
        if min(begins) < max(begins):
            mask = (torch.arange(width, device=device) < ends)[:, None, None]  # [a, 1, 1, width]
        return self.kept.run(torch.tensor(items, device=device), ids, columns, columns, mask, width)

    def _fill(self, whole: Sequence[Tensor]) -> None:
        """Keep the whole blocks of the prompts. Shorter prompts are padded behind, where no real token looks."""
        size, device = self.block_length, whole[0].device
        part = max(1, PREFILL // size) * size
        for begin in range(0, max(self.first), part):
            items = [item for item, length in enumerate(self.first) if length > begin]
            end = min(begin + part, max(self.first))
            rows = [whole[item][begin:end] for item in items]
            ids = torch.stack([nn.functional.pad(row, (0, end - begin - len(row))) for row in rows])
            columns = torch.arange(begin, end, device=device)
            grid = torch.arange(end, device=device) // size
            mask = columns[:, None] // size >= grid[None]
            columns = columns.expand(len(items), -1)
            self.kept.run(torch.tensor(items, device=device), ids, columns, columns, mask, end)


class KeptLayers:
    """The keys and values of every layer, for `items` rows of `width` columns."""

    def __init__(self, model, items: int, width: int):
        self.model, self.items, self.width = model, items, width
        self.layers: list[tuple[Tensor, Tensor]] = []  # of each block: keys and values [N, W, kv heads, head_dim]

    def run(
        self,
        items: Tensor,
        ids: Tensor,
        positions: Tensor,
        columns: Tensor,
        mask: Tensor | None,
        width: int | None = None,
    ) -> Tensor:
        """Run tokens [a, Q] of the rows `items` [a] against the first `width` columns, and store their own keys and
        values at `columns`. # [a, Q, D]

        `items` rise. `mask`: true where attended, for [a, heads, Q, width]. Without a `width` all columns are attended.
        """
        x = self.model.get_input_embeddings()(ids)
        rotation = self.model.rotation(positions, x.dtype)
        where = (items[:, None], columns)
        rows = slice(None) if len(items) == self.items else items  # no copy where all rows take part
        for number, block in enumerate(self.model.blocks):
            query, key, value = block.project(x, *rotation)
            if number == len(self.layers):
                shape = (self.items, self.width, *key.shape[2:])
                self.layers.append((key.new_zeros(shape), value.new_zeros(shape)))
            keys, values = self.layers[number]
            keys[where], values[where] = key, value
            attended = nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (query, keys[:, :width][rows], values[:, :width][rows])),
                attn_mask=mask,
                scale=block.scaling,
                enable_gqa=block.num_key_value_groups > 1,
            )
            x = block.finish(x, attended.transpose(1, 2).flatten(2))
        return self.model.last_norm(x)
