"""Keys and values that a block-wise sampler keeps while it writes a block (Fast-dLLM, arXiv 2505.22618).

The first step of every block runs the whole sequence and stores each layer's keys and values; the later steps run only
the block (kind "dual") or the block and what follows it ("prefix") against the stored rest. In a bidirectional model
the stored rest would have changed a little with every committed token, so answers differ from those of the full
computation, except where every block takes one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

KINDS = ("prefix", "dual")


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
        self.layers: list[tuple[Tensor, Tensor]] = []  # of each block: keys and values [N, W, kv heads, head_dim]

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
        x = self.model.get_input_embeddings()(ids)
        rotation = self.model.rotation((columns - self.pads[items, None]).clamp(min=0), x.dtype)
        mask = None if self.is_real is None else self.is_real[items][:, None, None]  # [a, 1, 1, W]
        where = (items[:, None], columns)
        for number, block in enumerate(self.model.blocks):
            query, key, value = block.project(x, *rotation)
            if number == len(self.layers):
                shape = (len(self.prompts), self.width, *key.shape[2:])
                self.layers.append((key.new_zeros(shape), value.new_zeros(shape)))
            keys, values = self.layers[number]
            keys[where], values[where] = key, value
            attended = nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (query, keys[items], values[items])),
                attn_mask=mask,
                scale=block.scaling,
                enable_gqa=block.num_key_value_groups > 1,
            )
            x = block.finish(x, attended.transpose(1, 2).flatten(2))
        return self.model.last_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states. [R, D] -> [R, V]"""
        return self.model.logits(hidden)
