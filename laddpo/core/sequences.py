"""What the model reads: a prompt and a response under one draw, and rows in which draws share their clean context.

A bidirectional model reads every draw by itself. A block-diffusion model reads noisy blocks beside the clean tokens
before them, and clean tokens never see noisy ones: so a prompt and a clean response are laid out once for all draws,

    [ prompt, whole blocks | clean chosen | clean rejected | noisy chosen, draw 1..n | noisy rejected, draw 1..n ]

The prompt's tail inside the first response block stands again in every copy of that block, where attention runs both
ways. Left out, because no masked token sees it: noisy blocks without a mask, and clean ones after the last noisy block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np


@dataclass(frozen=True)
class MaskedDraw:
    """One mask of one response. `masked`: ascending positions in the response; `weight`: what its log-sum counts.

    Under block diffusion each block has a weight of its own: `blocks` holds (masked tokens, weight) of every block.
    """

    index: int
    masked: np.ndarray
    weight: float = 1.0
    blocks: tuple[tuple[int, float], ...] | None = None

    @property
    def parts(self) -> tuple[tuple[int, float], ...]:
        """(masked tokens, weight) of its consecutive parts."""
        return ((len(self.masked), self.weight),) if self.blocks is None else self.blocks

    @property
    def token_weights(self) -> np.ndarray:
        """The weight of every masked token. # float64 [masked]"""
        counts, weights = zip(*self.parts, strict=True)
        return np.repeat(np.array(weights, dtype=np.float64), counts)


@dataclass(frozen=True)
class MaskedSequence:
    """A prompt and a response as the model will see them under one draw. # int32 [prompt], [L]

    `block_length` 0: a bidirectional model.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    draw: MaskedDraw
    block_length: int = 0

    @property
    def full_length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def tokens(self) -> int:
        """What the sequence costs by itself; a draw that masks nothing is known (0) without the model."""
        return row_tokens([self])

    @property
    def noisy_starts(self) -> np.ndarray:
        """Where the blocks with masked tokens begin. # int64, ascending"""
        return np.unique((len(self.prompt_ids) + self.draw.masked) // self.block_length) * self.block_length

    @property
    def noisy_positions(self) -> np.ndarray:
        """Positions of the tokens of these blocks. # int64, ascending"""
        positions = (self.noisy_starts[:, None] + np.arange(self.block_length)).ravel()
        return positions[positions < self.full_length]


@dataclass(frozen=True)
class Context:
    """One prompt's part of a row, in tokens: the prompt's whole blocks, the clean copy of each response, and the noisy
    copy of every draw of each response."""

    prompt: int
    clean: tuple[int, ...]
    noisy: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.clean) + sum(map(sum, self.noisy))


@dataclass(frozen=True)
class SharedRow:
    """Sequences of a block model, laid out with shared contexts.

    T tokens, M masked: positions and ids int64 [T], rows int64 [M] in the order of the sequences, targets int64 [M].
    """

    contexts: list[Context]
    ids: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    targets: np.ndarray


def row_tokens(sequences: Sequence[MaskedSequence]) -> int:
    """Tokens of the row that holds these sequences, in this order."""
    masked = [sequence for sequence in sequences if len(sequence.draw.masked)]
    if not masked or not masked[0].block_length:
        return sum(sequence.full_length for sequence in masked)
    return sum(context_of(responses).tokens for responses in by_context(masked))


def full_tokens(sides: Sequence[MaskedSequence], draws: int) -> int:
    """Tokens of so many draws of each of the sides of one item, if every block had a mask. `sides`: a draw of each."""
    first, lengths = sides[0], [len(side.response_ids) for side in sides]
    return tokens_of(len(first.prompt_ids), lengths, draws, first.block_length)


def tokens_of(prompt, responses: Sequence, draws: int, block_length: int):
    """Tokens of `draws` of each of the responses to one prompt, all blocks masked. Lengths in tokens, numbers or arrays
    of them. `block_length` 0: a bidirectional model, which shares nothing."""
    if not block_length:
        return draws * sum(prompt + length for length in responses)
    whole = prompt - prompt % block_length
    ends = [prompt + length for length in responses]
    return whole + sum((end - 1) // block_length * block_length - whole + draws * (end - whole) for end in ends)


def by_context(sequences: Sequence[MaskedSequence]) -> list[list[list[MaskedSequence]]]:
    """Neighbours that share their context: for each prompt, for each response to it, the draws. Shared means the same
    array."""
    prompts = groupby(sequences, key=lambda sequence: id(sequence.prompt_ids))
    return [[list(same) for _, same in groupby(group, key=lambda s: id(s.response_ids))] for _, group in prompts]


def context_of(responses: Sequence[Sequence[MaskedSequence]]) -> Context:
    """The tokens of a prompt's responses and their draws, each of which masks something."""
    block_length, prompt = responses[0][0].block_length, len(responses[0][0].prompt_ids)
    whole = prompt - prompt % block_length
    clean = [max(int(draw.noisy_starts[-1]) for draw in draws) - whole for draws in responses]
    noisy = [tuple(len(draw.noisy_positions) for draw in draws) for draws in responses]
    return Context(whole, tuple(clean), tuple(noisy))


def share_contexts(sequences: Sequence[MaskedSequence], mask_token_id: int) -> SharedRow:
    """Lay out sequences of a block model, each of which masks something.

    Example: prompt [5, 6], response [7, 8, 9], blocks of 2, a draw that masks position 2 -> ids [5, 6 | 7, 8 | mask],
    positions [0 .. 4], rows [4], targets [9].
    """
    contexts, ids, positions, rows, targets, start = [], [], [], [], [], 0
    for responses in by_context(sequences):
        context = context_of(responses)
        prompt = responses[0][0].prompt_ids
        whole = context.prompt
        clean = [np.concatenate([prompt, draws[0].response_ids]).astype(np.int64) for draws in responses]
        ids += [clean[0][:whole], *(full[whole : whole + n] for full, n in zip(clean, context.clean, strict=True))]
        positions += [np.arange(whole), *(np.arange(whole, whole + n) for n in context.clean)]

        start += whole + sum(context.clean)
        for full, draws in zip(clean, responses, strict=True):
            for sequence in draws:
                at, masked = sequence.noisy_positions, len(prompt) + sequence.draw.masked
                noisy = full.copy()
                noisy[masked] = mask_token_id
                ids.append(noisy[at])
                positions.append(at)
                rows.append(start + np.searchsorted(at, masked))
                targets.append(full[masked])
                start += len(at)
        contexts.append(context)
    return SharedRow(contexts, *(np.concatenate(part) for part in (ids, positions, rows, targets)))
