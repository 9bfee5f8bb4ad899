"""The diffusion ELBO of a response: masked draws in, one unbiased log-likelihood bound per draw out.

For a prompt x (never masked) and a response y of L tokens the bound is (LLaDA 2502.09992 eq. 6, VRPO 2505.19223 eq. 14)

    B(y|x) = E_{l ~ U{1..L}} E_{masks of l tokens} [ (L / l) * sum_{masked i} log p_theta(y_i | x, y with the mask) ]

A block-diffusion model is autoregressive over blocks of s tokens and masked inside one; its bound is a sum over blocks,
each with n tokens, an expectation and an l of its own (BD3-LM, arXiv 2503.09573):

    B(y|x) = sum_b E_{l ~ U{1..n}} E_{masks of l} [ (n / l) * sum_{masked i in b} log p(y_i | clean before b, noisy b) ]

A sum over tokens in nats, divided by nothing. An estimator is a recipe for draws (mask and weight) whose weighted sums
each have mean B. Per-draw values are accumulated in float64: margins are small differences of large sums.

Every draw follows one law (`draw_weight`): pick a token, hide it together with a uniformly random set of others. Which
token is picked may favour those that matter, and several draws may share the others out between them; the mean stays B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from laddpo.core.sequences import Context, MaskedSequence, share_contexts


@dataclass(frozen=True)
class PackedSequences:
    """Sequences laid end to end without padding; attention must stay within each.

    T tokens, M masked tokens over all sequences: input_ids [T], position_ids [T] (from 0 in each sequence), lengths
    (sum T), rows [M] (flat indices of the masked tokens, ascending), targets [M] (the true tokens there).
    `scores_first`: the first token of a sequence is among them, as after an empty prompt. `contexts`: for a block
    model, whose draws share clean tokens; `lengths` are then those of the contexts.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    rows: Tensor
    targets: Tensor
    scores_first: bool = False
    contexts: list[Context] | None = None


class Denoiser(Protocol):
    """A mask predictor. `token_logps` returns log p(target) at every masked token, differentiable. # float [M]"""

    mask_token_id: int
    device: torch.device
    block_length: int  # 0: bidirectional

    def token_logps(self, packed: PackedSequences) -> Tensor: ...


def pack_sequences(
    sequences: Sequence[MaskedSequence], mask_token_id: int, device: torch.device | str = "cpu"
) -> PackedSequences:
    """Lay sequences end to end, with the masked response tokens replaced by the mask token. Those of a block model
    share their contexts.

    Example: prompt [5], response [7, 8], draw masking position 1 -> input_ids [5, 7, mask], rows [2], targets [8].
    """
    if sequences[0].block_length:
        row = share_contexts(sequences, mask_token_id)
        parts = (torch.from_numpy(part).to(device) for part in (row.ids, row.positions, row.rows, row.targets))
        ids, positions, rows, targets = parts
        lengths = [context.tokens for context in row.contexts]
        return PackedSequences(ids, positions, lengths, rows, targets, contexts=row.contexts)
    ids, rows, targets, lengths, start = [], [], [], [], 0
    for sequence in sequences:
        response = sequence.response_ids.astype(np.int64)
        masked = sequence.draw.masked
        rows.append(start + len(sequence.prompt_ids) + masked)
        targets.append(response[masked])
        response[masked] = mask_token_id
        ids += [sequence.prompt_ids.astype(np.int64), response]
        lengths.append(len(sequence.prompt_ids) + len(response))
        start += lengths[-1]
    positions = np.concatenate([np.arange(length) for length in lengths])
    stacked = [np.concatenate(part) for part in (ids, rows, targets)]
    input_ids, rows_, targets_ = (torch.from_numpy(part).to(device, non_blocking=True) for part in stacked)
    scores_first = any(not len(sequence.prompt_ids) and 0 in sequence.draw.masked for sequence in sequences)
    return PackedSequences(input_ids, torch.from_numpy(positions).to(device), lengths, rows_, targets_, scores_first)


def draw_logps(denoiser: Denoiser, sequences: Sequence[MaskedSequence]) -> Tensor:
    """The weighted log-sum of every sequence's draw: one unbiased estimate of its ELBO each. # float64 [sequences]"""
    parts = [part for sequence in sequences for part in sequence.draw.parts]
    weights = torch.tensor([weight for _, weight in parts], dtype=torch.float64, device=denoiser.device)
    scored = [sequence for sequence in sequences if len(sequence.draw.masked)]
    if scored:
        logps = denoiser.token_logps(pack_sequences(scored, denoiser.mask_token_id, denoiser.device)).double()
        values = _sums(logps, [count for count, _ in parts]) * weights
    else:
        values = weights * 0.0
    of_each = [len(sequence.draw.parts) for sequence in sequences]
    return values if set(of_each) == {1} else _sums(values, of_each)


def _sums(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Sums of so many neighbours. Deterministic on a GPU, where scatter-adds are not; unsafe: without a check of the
    counts that would wait for it."""
    lengths = torch.tensor(counts, device=values.device)
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
