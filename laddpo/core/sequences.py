"""What the model reads: a prompt and a response under one draw, and rows in which draws share their clean context.

A bidirectional model reads every draw by itself. A block-diffusion model reads noisy blocks beside the clean tokens
before them, and clean tokens never see noisy ones: so a prompt and a clean response are laid out once for all draws,

    [ prompt, whole blocks | clean chosen | clean rejected | noisy chosen, draw 1..n | noisy rejected, draw 1..n ]

The prompt's tail inside the first response block stands again in every copy of that block, where attention runs both
ways. Left out, because no masked token sees it: noisy blocks without a mask, and the last clean block. Prompts whose
rows have one shape lie side by side, segment by segment, so that attention takes them as a batch.
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
    """The part of a row of `prompts` prompts alike in shape, in tokens: each one's whole blocks, the clean copy of each
    response to it, and the noisy copies of each response, those of the first prompt's draws first."""

    prompts: int
    prompt: int
    clean: tuple[int, ...]
    noisy: tuple[tuple[int, ...], ...]

    @property
    def segments(self) -> list[int]:
        """Tokens of all prompts, of each clean response to them, and of the draws of each."""
        return [*(self.prompts * n for n in (self.prompt, *self.clean)), *map(sum, self.noisy)]

    @property
    def tokens(self) -> int:
        return sum(self.segments)


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
    return sum(context_of([responses]).tokens for responses in by_context(masked))


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


def context_of(alike: Sequence[Sequence[Sequence[MaskedSequence]]]) -> Context:
    """The tokens of prompts of one shape: for each, for each response, the draws, each of which masks something."""
    first = alike[0]
    prompt, clean, _ = _shape(first)
    noisy = [
        tuple(len(draw.noisy_positions) for responses in alike for draw in responses[side])
        for side in range(len(first))
    ]
    return Context(len(alike), prompt, clean, tuple(noisy))


def _shape(responses: Sequence[Sequence[MaskedSequence]]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """What prompts must have in common to lie side by side: tokens of the prompt's whole blocks, of the clean copy of
    each response, and the number of draws of each."""
    size, prompt = responses[0][0].block_length, len(responses[0][0].prompt_ids)
    whole = prompt - prompt % size
    clean = tuple((draws[0].full_length - 1) // size * size - whole for draws in responses)
    return whole, clean, tuple(map(len, responses))


def share_contexts(sequences: Sequence[MaskedSequence], mask_token_id: int) -> SharedRow:
    """Lay out sequences of a block model, each of which masks something.

    Example: prompt [5, 6], response [7, 8, 9], blocks of 2, a draw that masks position 2 -> ids [5, 6 | 7, 8 | mask],
    positions [0 .. 4], rows [4], targets [9].
    """
    alike: dict[tuple, list[list[list[MaskedSequence]]]] = {}
    for responses in by_context(sequences):
        alike.setdefault(_shape(responses), []).append(responses)

    contexts, ids, positions, start = [], [], [], 0
    rows: dict[int, np.ndarray] = {}  # of every sequence, by its identity
    for group in alike.values():
        contexts.append(context_of(group))
        prompt, clean = contexts[-1].prompt, contexts[-1].clean
        spans = [(0, 0, prompt), *((side, prompt, prompt + n) for side, n in enumerate(clean))]
        for side, first, end in spans:
            ids += [_clean_ids(responses[side][0])[first:end] for responses in group]
            positions += [np.arange(first, end)] * len(group)
        start += len(group) * (prompt + sum(clean))

        for sequence in (draw for side in range(len(clean)) for responses in group for draw in responses[side]):
            at, noisy = sequence.noisy_positions, _clean_ids(sequence)
            masked = len(sequence.prompt_ids) + sequence.draw.masked
            noisy[masked] = mask_token_id
            ids.append(noisy[at])
            positions.append(at)
            rows[id(sequence)] = start + np.searchsorted(at, masked)
            start += len(at)
    targets = [sequence.response_ids[sequence.draw.masked].astype(np.int64) for sequence in sequences]
    parts = (ids, positions, [rows[id(sequence)] for sequence in sequences], targets)
    return SharedRow(contexts, *map(np.concatenate, parts))


def _clean_ids(sequence: MaskedSequence) -> np.ndarray:
    """Prompt and response. # int64"""
    return np.concatenate([sequence.prompt_ids, sequence.response_ids]).astype(np.int64)
