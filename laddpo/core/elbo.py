"""The diffusion ELBO of a response: masked draws in, one unbiased log-likelihood bound per draw out.

For a prompt x (never masked) and a response y of L tokens the bound is (LLaDA 2502.09992 eq. 6, VRPO 2505.19223 eq. 14)

    B(y|x) = E_{l ~ U{1..L}} E_{masks of l tokens} [ (L / l) * sum_{masked i} log p_theta(y_i | x, y with the mask) ]

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

from laddpo.core.draws import MaskedSequence


@dataclass(frozen=True)
class PackedSequences:
    """Sequences laid end to end without padding; attention must stay within each.

    T tokens, M masked tokens over all sequences: input_ids [T], position_ids [T] (from 0 in each sequence), lengths
    (sum T), rows [M] (flat indices of the masked tokens, ascending), targets [M] (the true tokens there).
    `scores_first`: the first token of a sequence is among them, as after an empty prompt.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    rows: Tensor
    targets: Tensor
    scores_first: bool = False


class Denoiser(Protocol):
    """A mask predictor. `token_logps` returns log p(target) at every masked token, differentiable. # float [M]"""

    mask_token_id: int
    device: torch.device

    def token_logps(self, packed: PackedSequences) -> Tensor: ...


def pack_sequences(
    sequences: Sequence[MaskedSequence], mask_token_id: int, device: torch.device | str = "cpu"
) -> PackedSequences:
    """Lay sequences end to end, with the masked response tokens replaced by the mask token.

    Example: prompt [5], response [7, 8], draw masking position 1 -> input_ids [5, 7, mask], rows [2], targets [8].
    """
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
    weights = torch.tensor([s.draw.weight for s in sequences], dtype=torch.float64, device=denoiser.device)
    scored = [s for s in sequences if s.tokens]
    if not scored:
        return weights * 0.0
    logps = denoiser.token_logps(pack_sequences(scored, denoiser.mask_token_id, denoiser.device)).double()
    counts = torch.tensor([len(s.draw.masked) for s in sequences], device=denoiser.device)
    # deterministic on a GPU, where scatter-adds are not; unsafe: without a check of the counts that would wait for it
    return torch.segment_reduce(logps, "sum", lengths=counts, unsafe=True) * weights
