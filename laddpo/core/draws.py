"""Masked draws of a response: which tokens are masked, and what a draw weighs in the ELBO's estimate.

A new estimator is one function and one row of ESTIMATORS. Settings, checks and notes read the row.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from laddpo.core.noise import COUNT_OF_BOTH_SIDES, COUNT_SCHEDULES, FULL, NoiseKey, golden_step, random_order
from laddpo.core.sequences import MaskedDraw, MaskedSequence

BERNOULLI_FLOOR = 1e-3  # LLaDA's own: p_mask = (1 - 1e-3) t + 1e-3
NO_POSITIONS = np.array([], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Response:
    """What the draws of a response, or of one block of it, may depend on beside the seed: its pair, its side (chosen,
    rejected, response), its length in tokens, the positions of the tokens that picks may favour, and the number of the
    block. Draws that are made together are kept for the same object."""

    pair_id: str
    side: str
    length: int
    favoured: np.ndarray = field(default_factory=lambda: NO_POSITIONS)
    block: int | None = None


@dataclass(frozen=True)
class ElboEstimator:
    """Which draws stand for the expectation. Draws are a function of (seed, pair id, side, draw index) alone.

    `estimator`: a row of ESTIMATORS; `schedule`: a row of COUNT_SCHEDULES; `diffusion_samples` n: draws per response;
    `shared_counts`: chosen and rejected mask the same fraction; `mask_rounds` R: epoch e uses draws (e mod R) * n + k;
    `stream` names an independent family of draws ("" is the one that policy and reference share); `shared_masks`:
    chosen and rejected mask the same positions too; `difference_focus`: the share of picks for tokens in which
    the two responses differ, the rest going to all tokens alike; `surprise_focus`: the same for the tokens that
    surprise the reference most, which are a share `surprise_share` of a response as told by `surprise_draws` draws
    (core/surprise.py); `count_tilt`: the share of counts that follows the tilted law (`count_law`), the rest being
    uniform; `block_length` s: the blocks of a block-diffusion model, each of which draws for itself (0: a bidirectional
    model). At most one focus is above 0.
    """

    estimator: str = "complement"
    schedule: str = "low_discrepancy"
    diffusion_samples: int = 4
    seed: int = 42
    shared_counts: bool = True
    mask_rounds: int = 1
    stream: str = ""
    shared_masks: bool = False
    difference_focus: float = 0.0
    count_tilt: float = 0.0
    block_length: int = 0
    surprise_focus: float = 0.0
    surprise_share: float = 0.2
    surprise_draws: int = 8

    @property
    def focus(self) -> float:
        """The share of picks for favoured tokens, whichever these are."""
        return self.surprise_focus or self.difference_focus

    @property
    def block(self) -> int:
        """How many neighbouring draws are anything but independent: a mask and its inverse, or nearly so.

        Blocks of draws that are spread out (by a schedule, a focus or `balanced`) differ more than by chance: variances
        told by their spread are too large, 1 to 2.6 times on normal tokens, never too small. The draws of `exact` are
        one block: their mean has no variance.
        """
        law = ESTIMATORS[self.estimator]
        return exact_draws(self.block_length) if law.is_exact else law.block

    def draw_indices(self, epoch: int) -> range:
        """The indices of the n draws that this epoch uses."""
        start = (epoch % self.mask_rounds) * self.diffusion_samples
        return range(start, start + self.diffusion_samples)

    def draw(
        self,
        pair_id: str,
        side: str,
        length: int,
        index: int,
        favoured: np.ndarray = NO_POSITIONS,
        prompt_length: int = 0,
    ) -> MaskedDraw:
        """One draw for a response of `length` tokens, of which picks favour those at `favoured`, after a prompt of
        `prompt_length` tokens. In a block model it is a draw of every block."""
        return self._draw(self._parts(pair_id, side, length, favoured, prompt_length), index)

    def _parts(
        self, pair_id: str, side: str, length: int, favoured: np.ndarray, prompt_length: int
    ) -> list[tuple[int, Response]]:
        """What draws for itself, with its start in the response: all of it, or each block."""
        if not self.block_length:
            return [(0, Response(pair_id, side, length, favoured))]
        return [
            (start, Response(pair_id, side, end - start, _within(favoured, start, end), block))
            for block, (start, end) in enumerate(block_spans(prompt_length, length, self.block_length))
        ]

    def _draw(self, parts: Sequence[tuple[int, Response]], index: int) -> MaskedDraw:
        law = ESTIMATORS[self.estimator].draw
        if not self.block_length:
            return law(self, parts[0][1], index)
        draws = [law(self, response, index) for _, response in parts]
        masked = np.concatenate([start + draw.masked for (start, _), draw in zip(parts, draws, strict=True)])
        return MaskedDraw(index, masked, blocks=tuple((len(draw.masked), draw.weight) for draw in draws))

    def sequences(
        self,
        pair_id: str,
        side: str,
        prompt_ids: np.ndarray,
        response_ids: np.ndarray,
        indices: Sequence[int],
        favoured: np.ndarray = NO_POSITIONS,
    ) -> tuple[MaskedSequence, ...]:
        """The response under each of the draws `indices`."""
        parts = self._parts(pair_id, side, len(response_ids), favoured, len(prompt_ids))
        return tuple(
            MaskedSequence(prompt_ids, response_ids, self._draw(parts, index), self.block_length) for index in indices
        )

    def key(self, response: Response, index: int) -> NoiseKey:
        """Identity of a draw's mask."""
        side = COUNT_OF_BOTH_SIDES if self.shared_masks else response.side
        return NoiseKey(self.seed, response.pair_id + self.stream, side, index, response.block)

    def count_key(self, response: Response, index: int) -> NoiseKey:
        """Identity of what decides a draw's masked count."""
        side = COUNT_OF_BOTH_SIDES if self.shared_counts else response.side
        return NoiseKey(self.seed, response.pair_id + self.stream, side, index, response.block)

    def count_fraction(self, response: Response, index: int, draws: int) -> int:
        """Where in [0, FULL) the masked fraction of draw `index` lies."""
        return COUNT_SCHEDULES[self.schedule].of_block(self.count_key(response, 0), index, draws)

    def store_fields(self) -> dict:
        """What a store of reference values must have in common with a run to serve it.

        The number of draws is among it only for schedules whose draws depend on it, the block length only where the
        model has blocks, what defines surprising tokens only where these are favoured.
        """
        fields = asdict(self)
        if not self.surprise_focus:
            fields = {name: value for name, value in fields.items() if not name.startswith("surprise_")}
        if not self.block_length:
            del fields["block_length"]
        if COUNT_SCHEDULES[self.schedule].prefix_consistent:
            del fields["diffusion_samples"]
        return fields


def block_spans(prompt_length: int, length: int, block_length: int) -> list[tuple[int, int]]:
    """The blocks that hold response tokens, as [start, end) in the response. The grid starts with the prompt.

    Example: a prompt of 10, a response of 7 and blocks of 4 -> [(0, 2), (2, 6), (6, 7)].
    """
    ends = range(block_length - prompt_length % block_length, length + block_length, block_length)
    return [(max(0, end - block_length), min(end, length)) for end in ends]


def _within(positions: np.ndarray, start: int, end: int) -> np.ndarray:
    """Positions inside [start, end), counted from its start."""
    return positions[(positions >= start) & (positions < end)] - start


def draw_weight(e: ElboEstimator, response: Response, masked: np.ndarray) -> float:
    """1 / (L q(l) pi(masked)): q(l) is the law of the count, pi(i) the probability that token i is the picked one, and
    pi(set) adds up.

    With the other l-1 tokens uniform, a mask M of size l has probability q(l) sum_{i in M} pi(i) / C(L-1, l-1), which
    is L q(l) pi(M) (L/l) times what it has in the bound, where it counts (L/l) S(M). So S(M) / (L q(l) pi(M)) has mean
    B for any q, pi > 0, without another forward; for equal ones it is LLaDA's (L/l) S(M).

    That holds given the favoured tokens, so it holds for any that do not depend on the noise of these draws. Differing
    tokens depend on the token ids alone, surprising ones on the reference and on the noise of a stream that no other
    draw uses.
    """
    length, size = response.length, len(masked)
    focus = e.focus if len(response.favoured) else 0.0
    if not focus and not e.count_tilt:
        return length / size
    law = length * count_law(length, e.count_tilt)[1][size - 1] if e.count_tilt else 1.0
    hidden = focus * _is_in(masked, length)[response.favoured].mean() if focus else 0.0
    return float(1 / (law * (hidden + (1 - focus) * size / length)))


def _is_in(positions: np.ndarray, length: int) -> np.ndarray:
    """Which of the positions 0..length-1 are among these. # bool [length]"""
    found = np.zeros(length, dtype=bool)
    found[positions] = True
    return found


@functools.lru_cache(maxsize=4096)
def count_law(length: int, tilt: float) -> tuple[list[int], list[float]]:
    """The law of the masked count: (upper ends of its folded halves in [0, FULL / 2), q of the counts 1..L).

    A mix of uniform counts and q(l) ~ sqrt(1/l + 1/(L+1-l)), under which the weight of a token has the least variance
    if it counts alike in every mask of a pair. Uniform counts are best where tokens only count together; a mix is near
    both, and keeps masks of few tokens, whose weights are largest, from being rare.
    """
    tilted = [math.sqrt(1 / size + 1 / (length + 1 - size)) for size in range(1, length + 1)]
    total = math.fsum(tilted)
    law = [(1 - tilt) / length + tilt * value / total for value in tilted]
    ends = [int(math.fsum(law[:size]) * FULL) for size in range(1, (length + 1) // 2)]
    return [*ends, FULL >> 1], law


def mask_size(e: ElboEstimator, length: int, fraction: int) -> int:
    """The count at a place in [0, FULL) of its law, from few tokens to many; mirrored places give l and L + 1 - l."""
    if not e.count_tilt:
        return 1 + (fraction * length >> 64)
    ends, _ = count_law(length, e.count_tilt)
    if fraction < FULL >> 1:
        return 1 + bisect.bisect_right(ends, fraction)
    return length - bisect.bisect_right(ends, FULL - 1 - fraction)


def picked_token(e: ElboEstimator, response: Response, index: int) -> int:
    """The token that pick `index` falls on, with probability pi.

    Picks walk by golden steps from a keyed start, so that neighbours fall on tokens far apart.
    """
    start = int(e.key(response, 0).words("pick-start", 1)[0])
    place = golden_step(start, index)
    boundary = int(e.focus * FULL) if len(response.favoured) else 0
    if place < boundary:
        return int(response.favoured[place * len(response.favoured) // boundary])
    return (place - boundary) * response.length // (FULL - boundary)


def count_draw(e: ElboEstimator, response: Response, index: int) -> MaskedDraw:
    """Exact count: l ~ U{1..L}, l tokens without replacement, weight L / l (LLaDA eq. 6)."""
    length = response.length
    fraction = e.count_fraction(response, index, e.diffusion_samples)
    size = mask_size(e, length, fraction)
    order = random_order(e.key(response, index), length)
    if e.focus:
        picked = picked_token(e, response, index)
        order = np.concatenate([[picked], order[order != picked]])
    masked = np.sort(order[:size])
    return MaskedDraw(index, masked, draw_weight(e, response, masked))


def complement_draw(e: ElboEstimator, response: Response, index: int) -> MaskedDraw:
    """Draw 2j is a mask with l ~ U{0..L}, draw 2j+1 its inverse; weight (L+1) / size, an empty mask counts 0.

    Each of them alone has mean B: sum_l 1/(L+1) * (L+1)/l * E[S_l] = sum_l E[S_l] / l. Together they score every token
    exactly once, which removes the variance (complementary masks: ESPO 2512.03759). The fraction is folded at 1/2,
    with a keyed coin for which of the two comes first: a schedule that spreads points over [0, 1) then spreads the
    pairs {u, 1-u}, instead of letting two of them fall on each other.

    With a focus or tilt both halves hide the picked token and share out the others. So do those of a block: an empty
    mask is one of few there, and would bring more noise than the inverse removes.
    """
    length, pair_index = response.length, index // 2
    folded, small_first = _folded_fraction(e, response, pair_index)
    if e.focus or e.count_tilt or response.block is not None:
        picked = picked_token(e, response, pair_index)
        order = random_order(e.key(response, 2 * pair_index), length)
        others, size = order[order != picked], mask_size(e, length, folded) - 1
        masked = others[:size] if small_first == (index % 2 == 0) else others[size:]
        masked = np.sort(np.append(masked, picked))
        return MaskedDraw(index, masked, draw_weight(e, response, masked))
    fraction = folded if small_first else FULL - 1 - folded
    size = fraction * (length + 1) >> 64
    order = random_order(e.key(response, 2 * pair_index), length)
    masked = order[size:] if index % 2 else order[:size]
    return MaskedDraw(index, np.sort(masked), (length + 1) / len(masked) if len(masked) else 0.0)


def balanced_draw(e: ElboEstimator, response: Response, index: int) -> MaskedDraw:
    """Four masks at a time that together hide every token twice (picked tokens more often), no two as inverses.

    Draws 4q, 4q+1 pick a and draws 4q+2, 4q+3 pick b. In each of the two pairs one mask is small (r others, r from the
    folded fraction) and one large (all but r others). Inverses have one fault: whether two tokens are hidden together
    is the same in a mask and in its inverse, so that noise doubles. Here the small masks A, B of sizes p <= q are
    disjoint, and what the large ones leave visible is A + B dealt out again: with the others in a random order,

        small:  A = [0, p)        B = [p, p+q)        large leaves visible:  [p, 2p)        [0, p) + [2p, p+q)

    Each mask alone is a pick and a uniformly random set of others of its size, so each draw has mean B.
    """
    return _quad(e, response, index // 4)[index % 4]


@functools.lru_cache(maxsize=256)
def _quad(e: ElboEstimator, response: Response, quad: int) -> tuple[MaskedDraw, ...]:
    """The draws 4 quad, ..., 4 quad + 3 of `balanced_draw`, and how they are made."""
    length, key = response.length, e.key(response, 4 * quad)
    picks = [picked_token(e, response, 2 * quad + pair) for pair in (0, 1)]
    folded, small_first = zip(*(_folded_fraction(e, response, 2 * quad + pair) for pair in (0, 1)), strict=True)
    sizes = [mask_size(e, length, fraction) - 1 for fraction in folded]  # r of each pair, below L / 2
    in_small = [False, False]  # does the small mask of a pair hide the other pair's pick?
    if picks[0] != picks[1]:
        # two events of probability r / (L-1), as far from coinciding as can be: else A and B might not fit
        place = int(key.words("other-pick", 1)[0]) * (length - 1) >> 64
        in_small = [place < sizes[0], place >= length - 1 - sizes[1]]
    order = random_order(key, length)
    others = order[(order != picks[0]) & (order != picks[1])]
    p, q = sorted(size - extra for size, extra in zip(sizes, in_small, strict=True))
    draws = []
    for in_quad in range(4):
        pair = in_quad // 2
        is_smaller = sizes[pair] - in_small[pair] == p and (pair == 0 or sizes[0] - in_small[0] != p)
        is_small = small_first[pair] == (in_quad % 2 == 0)
        if is_small:
            hidden = _is_in(others[:p] if is_smaller else others[p : p + q], length)
        else:
            hidden = _is_in(others, length)
            for visible in [others[p : 2 * p]] if is_smaller else [others[:p], others[2 * p : p + q]]:
                hidden[visible] = False
        hidden[picks[pair]] = True
        if picks[0] != picks[1] and in_small[pair] == is_small:
            hidden[picks[1 - pair]] = True
        masked = np.flatnonzero(hidden)
        draws.append(MaskedDraw(4 * quad + in_quad, masked, draw_weight(e, response, masked)))
    return tuple(draws)


def bernoulli_draw(e: ElboEstimator, response: Response, index: int) -> MaskedDraw:
    """Each token masked with probability p ~ U(1e-3, 1), weight 1 / p: LLaDA's training form, for comparison only.

    Biased by the floor, and without it of infinite variance (its one-token term diverges): never a default.
    """
    fraction = e.count_fraction(response, index, e.diffusion_samples) / FULL
    p = (1 - BERNOULLI_FLOOR) * fraction + BERNOULLI_FLOOR
    words = e.key(response, index).words("bernoulli", response.length)
    return MaskedDraw(index, np.flatnonzero(words / FULL < p), 1 / p)


def exact_draw(e: ElboEstimator, response: Response, index: int) -> MaskedDraw:
    """The N = 2^s - 1 draws of a block hold each of its masks M once, weighted N / (l C(n, l)), l = |M|: their mean is
    the bound itself, sum over M of S(M) / (l C(n, l)). A block of n < s tokens has fewer masks; draws left over are
    empty. A keyed order makes each draw alone have mean B.
    """
    count, length = exact_draws(e.block_length), response.length
    turn, place = divmod(index, count)
    mask = 1 + int(random_order(e.key(response, turn), count, purpose="exact")[place])
    if mask >> length:
        return MaskedDraw(index, NO_POSITIONS, 0.0)
    masked = np.array([i for i in range(length) if mask >> i & 1])
    return MaskedDraw(index, masked, count / (len(masked) * math.comb(length, len(masked))))


def exact_draws(block_length: int) -> int:
    """How many draws the exact bound of a block model takes."""
    return 2**block_length - 1


def _folded_fraction(e: ElboEstimator, response: Response, pair_index: int) -> tuple[int, bool]:
    """The smaller masked fraction of a pair {u, 1-u} of draws, below FULL / 2, and whether it comes first."""
    folded = e.count_fraction(response, pair_index, max(1, e.diffusion_samples // 2)) >> 1
    key = e.count_key(response, pair_index)
    if COUNT_SCHEDULES[e.schedule].over_blocks == "same":
        key = replace(key, block=None)
    return folded, bool(int(key.words("count-coin", 1)[0]) & 1)


@dataclass(frozen=True)
class MaskLaw:
    """A row of ESTIMATORS.

    `block`: neighbouring draws that are not independent. `together`: draws that are made together; a number of draws
    that is no multiple of it has more noise, and is refused if `refuses_parts`. `picks`: dpo.focus and dpo.count_tilt
    mean something to it. `is_exact`: all masks of a block, for block models alone. `note`: what a user
    who chooses it should know.
    """

    draw: Callable[[ElboEstimator, Response, int], MaskedDraw]
    block: int = 1
    together: int = 1
    refuses_parts: bool = False
    picks: bool = True
    is_exact: bool = False
    note: str | None = None


ESTIMATORS: dict[str, MaskLaw] = {
    "count": MaskLaw(count_draw),
    "complement": MaskLaw(complement_draw, block=2, together=2, refuses_parts=True),
    "balanced": MaskLaw(balanced_draw, block=2, together=4),
    "exact": MaskLaw(exact_draw, picks=False, is_exact=True),
    "bernoulli": MaskLaw(
        bernoulli_draw, picks=False, note="is biased and of large variance; it exists to compare with older code."
    ),
}
