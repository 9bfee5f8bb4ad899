"""The diffusion ELBO of a response: masked draws in, one unbiased log-likelihood bound per draw out.

For a prompt x (never masked) and a response y of L tokens the bound is (LLaDA 2502.09992 eq. 6, VRPO 2505.19223 eq. 14)

    B(y|x) = E_{l ~ U{1..L}} E_{masks of l tokens} [ (L / l) * sum_{masked i} log p_theta(y_i | x, y with the mask) ]

A sum over tokens in nats, divided by nothing. An estimator is a recipe for draws (mask and weight) whose weighted sums
each have mean B. Per-draw values are accumulated in float64: margins are small differences of large sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from laddpo.core.noise import COUNT_OF_BOTH_SIDES, COUNT_SCHEDULES, FULL, NoiseKey, random_order

BERNOULLI_FLOOR = 1e-3  # LLaDA's own: p_mask = (1 - 1e-3) t + 1e-3


@dataclass(frozen=True)
class MaskedDraw:
    """One mask of one response. `masked`: ascending positions in the response; `weight`: what its log-sum counts."""

    index: int
    masked: np.ndarray
    weight: float


@dataclass(frozen=True)
class MaskedSequence:
    """A prompt and a response as the model will see them under one draw. # int32 [prompt], [L]"""

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    draw: MaskedDraw

    @property
    def tokens(self) -> int:
        """What the sequence costs; a draw that masks nothing is known (0) without the model."""
        return len(self.prompt_ids) + len(self.response_ids) if len(self.draw.masked) else 0


@dataclass(frozen=True)
class PackedSequences:
    """Sequences laid end to end without padding; attention must stay within each.

    T tokens, M masked tokens over all sequences: input_ids [T], position_ids [T] (from 0 in each sequence), lengths
    (sum T), rows [M] (flat indices of the masked tokens, ascending), targets [M] (the true tokens there).
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    rows: Tensor
    targets: Tensor


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
    return PackedSequences(input_ids, torch.from_numpy(positions).to(device), lengths, rows_, targets_)


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


@dataclass(frozen=True)
class ElboEstimator:
    """Which draws stand for the expectation. Draws are a function of (seed, pair id, side, draw index) alone.

    `estimator`: a row of ESTIMATORS; `schedule`: a row of COUNT_SCHEDULES; `diffusion_samples` n: draws per response;
    `shared_counts`: chosen and rejected mask the same fraction; `mask_rounds` R: epoch e uses draws (e mod R) * n + k.
    `stream` names an independent family of draws ("" is the one that policy and reference share).
    """

    estimator: str = "complement"
    schedule: str = "low_discrepancy"
    diffusion_samples: int = 4
    seed: int = 42
    shared_counts: bool = True
    mask_rounds: int = 1
    stream: str = ""

    @property
    def block(self) -> int:
        """How many neighbouring draws belong together, being each other's inverse."""
        return 2 if self.estimator == "complement" else 1

    def draw_indices(self, epoch: int) -> range:
        """The indices of the n draws that this epoch uses."""
        start = (epoch % self.mask_rounds) * self.diffusion_samples
        return range(start, start + self.diffusion_samples)

    def draw(self, pair_id: str, side: str, length: int, index: int) -> MaskedDraw:
        """One draw for a response of `length` tokens."""
        return ESTIMATORS[self.estimator](self, pair_id, side, length, index)

    def sequences(
        self, pair_id: str, side: str, prompt_ids: np.ndarray, response_ids: np.ndarray, indices: Sequence[int]
    ) -> tuple[MaskedSequence, ...]:
        """The response under each of the draws `indices`."""
        return tuple(
            MaskedSequence(prompt_ids, response_ids, self.draw(pair_id, side, len(response_ids), index))
            for index in indices
        )

    def key(self, pair_id: str, side: str, index: int) -> NoiseKey:
        """Identity of a draw's mask."""
        return NoiseKey(self.seed, pair_id + self.stream, side, index)

    def count_fraction(self, pair_id: str, side: str, index: int, draws: int) -> int:
        """Where in [0, FULL) the masked fraction of draw `index` lies."""
        shared = COUNT_OF_BOTH_SIDES if self.shared_counts else side
        return COUNT_SCHEDULES[self.schedule].fraction(self.key(pair_id, shared, 0), index, draws)

    def store_fields(self) -> dict:
        """What a store of reference values must have in common with a run to serve it.

        The number of draws is among it only for schedules whose draws depend on it.
        """
        fields = asdict(self)
        if COUNT_SCHEDULES[self.schedule].prefix_consistent:
            del fields["diffusion_samples"]
        return fields


def count_draw(e: ElboEstimator, pair_id: str, side: str, length: int, index: int) -> MaskedDraw:
    """Exact count: l ~ U{1..L}, l tokens without replacement, weight L / l (LLaDA eq. 6)."""
    fraction = e.count_fraction(pair_id, side, index, e.diffusion_samples)
    masked = 1 + (fraction * length >> 64)
    order = random_order(e.key(pair_id, side, index), length)
    return MaskedDraw(index, np.sort(order[:masked]), length / masked)


def complement_draw(e: ElboEstimator, pair_id: str, side: str, length: int, index: int) -> MaskedDraw:
    """Draw 2j is a mask with l ~ U{0..L}, draw 2j+1 its inverse; weight (L+1) / size, an empty mask counts 0.

    Each of them alone has mean B: sum_l 1/(L+1) * (L+1)/l * E[S_l] = sum_l E[S_l] / l. Together they score every token
    exactly once, which is where variance goes (complementary masks: ESPO 2512.03759). The fraction is folded at 1/2,
    with a keyed coin for which of the two comes first: a schedule that spreads points over [0, 1) then spreads the
    pairs {u, 1-u}, instead of letting two of them fall on each other.
    """
    pair_index = index // 2
    folded = e.count_fraction(pair_id, side, pair_index, max(1, e.diffusion_samples // 2)) >> 1
    shared = COUNT_OF_BOTH_SIDES if e.shared_counts else side
    coin = int(e.key(pair_id, shared, pair_index).words("count-coin", 1)[0]) & 1
    fraction = folded if coin else FULL - 1 - folded
    size = fraction * (length + 1) >> 64
    order = random_order(e.key(pair_id, side, 2 * pair_index), length)
    masked = order[size:] if index % 2 else order[:size]
    return MaskedDraw(index, np.sort(masked), (length + 1) / len(masked) if len(masked) else 0.0)


def bernoulli_draw(e: ElboEstimator, pair_id: str, side: str, length: int, index: int) -> MaskedDraw:
    """Each token masked with probability p ~ U(1e-3, 1), weight 1 / p: LLaDA's training form, for comparison only.

    Biased by the floor, and without it of infinite variance (its one-token term diverges): never a default.
    """
    fraction = e.count_fraction(pair_id, side, index, e.diffusion_samples) / FULL
    p = (1 - BERNOULLI_FLOOR) * fraction + BERNOULLI_FLOOR
    words = e.key(pair_id, side, index).words("bernoulli", length)
    return MaskedDraw(index, np.flatnonzero(words / FULL < p), 1 / p)


ESTIMATORS: dict[str, Callable[[ElboEstimator, str, str, int, int], MaskedDraw]] = {
    "count": count_draw,
    "complement": complement_draw,
    "bernoulli": bernoulli_draw,
}
