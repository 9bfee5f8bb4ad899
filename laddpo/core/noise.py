"""The noise of the diffusion likelihood as a function of identity: which response tokens are masked in which draw.

A draw is decided by (seed, pair id, side, draw index) alone, so policy and reference see bit-equal masks whatever the
batch, order, micro-step, process count, epoch or resume. No state exists that could be lost or shared by accident.

Recipe: blake2b-128 of the length-prefixed fields keys numpy's Philox counter generator, of which only `random_raw` is
used (numpy promises that stream; it does not promise those of `Generator`). torch generators are not used: the CPU one
drops the upper 32 bits of its seed. Masked counts are computed in 64-bit integers, exactly.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

FULL = 1 << 64  # one turn of a 64-bit fraction: the integer u means the real number u / FULL in [0, 1)
GOLDEN = 11400714819323198485  # FULL / 1.6180339887…, to the nearest odd number
COUNT_OF_BOTH_SIDES = "both"  # the side in a count's key where chosen and rejected share their masked fraction


@dataclass(frozen=True)
class NoiseKey:
    """Identity of one draw: the only thing its noise depends on.

    `side` is "chosen", "rejected" or "response" (an SFT row); `draw` counts from 0 over all epochs' draws; `block`
    counts the response's blocks from 0 where the model is block diffusion.
    """

    seed: int
    pair_id: str
    side: str
    draw: int
    block: int | None = None

    def words(self, purpose: str, count: int) -> np.ndarray:
        """`count` uniform 64-bit words, independent between purposes. # uint64 [count]"""
        digest = hashlib.blake2b(digest_size=16, person=b"laddpo-draw-v1")
        block = () if self.block is None else (f"block {self.block}",)
        for field in (str(self.seed), self.pair_id, self.side, str(self.draw), *block, purpose):
            encoded = field.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return philox_words(digest.digest(), count)


_of_thread = threading.local()


def philox_words(key: bytes, count: int) -> np.ndarray:
    """The first words of numpy's Philox under a key of 16 bytes. # uint64 [count]

    Each thread has one generator whose state is set: making one takes five times as long as that.
    """
    if not hasattr(_of_thread, "generator"):
        _of_thread.generator = np.random.Philox(key=0)
        _of_thread.state = _of_thread.generator.state
    _of_thread.state["state"]["key"] = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    _of_thread.generator.state = _of_thread.state
    return _of_thread.generator.random_raw(count)


def random_order(key: NoiseKey, length: int, purpose: str = "mask") -> np.ndarray:
    """A uniformly random order of positions 0..length-1. # int64 [length]"""
    return np.argsort(key.words(purpose, length), kind="stable")


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits `count` items: a pure function, so resuming saves no data position."""
    return random_order(NoiseKey(seed, "epoch", "order", epoch), count, purpose="order")


# Count schedules: where in [0, 1) the masked fraction of each draw lies. Each single draw is uniform (so every estimate
# is unbiased); schedules differ in how evenly several draws of one pair spread, which is where variance is won.


def iid_fraction(key: NoiseKey, index: int, draws: int) -> int:
    """Independent draws, as VRPO has them (arXiv 2505.19223)."""
    return int(replace(key, draw=index).words("count", 1)[0])


def low_discrepancy_fraction(key: NoiseKey, index: int, draws: int) -> int:
    """Van der Corput's sequence in base 2 under a keyed random shift (Cranley and Patterson 1976).

    Draw k does not depend on how many draws there are, so one reference store serves every n; for n a power of two the
    points are the systematic grid, one in each n-th of [0, 1).
    """
    shift = int(replace(key, draw=0).words("count-shift", 1)[0])
    return (shift + reversed_bits(index)) % FULL


def stratified_fraction(key: NoiseKey, index: int, draws: int) -> int:
    """One independent point in each n-th of [0, 1). The grid, so the key too, depends on n."""
    turn, cell = divmod(index, draws)
    word = int(replace(key, draw=index).words(f"count-stratified-{draws}", 1)[0])
    return (_shuffled_cell(key, turn, cell, draws, "stratified") * FULL + word) // draws


def systematic_fraction(key: NoiseKey, index: int, draws: int) -> int:
    """A grid of n equal steps under one random shift (what LLaDA's own evaluator does inside a batch)."""
    turn, cell = divmod(index, draws)
    word = int(replace(key, draw=turn).words(f"count-systematic-{draws}", 1)[0])
    return (_shuffled_cell(key, turn, cell, draws, "systematic") * FULL + word) // draws


def single_fraction(key: NoiseKey, index: int, draws: int) -> int:
    """The same fraction in every draw: one time, many masks, which VRPO (prop. 1) shows to be the worst use of n."""
    return iid_fraction(key, 0, draws)


def _shuffled_cell(key: NoiseKey, turn: int, cell: int, draws: int, name: str) -> int:
    """Which cell of the grid this draw takes: shuffled, so that each single draw is uniform over all of [0, 1)."""
    order = random_order(replace(key, draw=turn), draws, f"count-{name}-cells-{draws}")
    return int(order[cell])


def golden_step(start: int, index: int) -> int:
    """The point `index` steps of the golden ratio after `start`, modulo FULL: neighbours lie far apart, for any number
    of them (Kronecker sequence of the most irrational number)."""
    return (start + index * GOLDEN) % FULL


def reversed_bits(index: int) -> int:
    """The 64 bits of `index` mirrored: van der Corput's radical inverse in base 2, as a fraction of FULL."""
    return int(f"{index:064b}"[::-1], 2)


@dataclass(frozen=True)
class CountSchedule:
    """A row of COUNT_SCHEDULES. `prefix_consistent`: draw k is the same for every number of draws. `over_blocks`: how
    the blocks of a response share the fractions, "spread" by golden steps, "own" (independent) or the "same". `note`:
    what a user who chooses it should know."""

    fraction: Callable[[NoiseKey, int, int], int]
    prefix_consistent: bool
    over_blocks: str = "spread"
    note: str | None = None

    def of_block(self, key: NoiseKey, index: int, draws: int) -> int:
        """The fraction of draw `index` in the block that the key names, if it names one."""
        if key.block is None or self.over_blocks == "own":
            return self.fraction(key, index, draws)
        steps = key.block if self.over_blocks == "spread" else 0
        return golden_step(self.fraction(replace(key, block=None), index, draws), steps)


COUNT_SCHEDULES: dict[str, CountSchedule] = {
    "iid": CountSchedule(iid_fraction, prefix_consistent=True, over_blocks="own"),
    "low_discrepancy": CountSchedule(low_discrepancy_fraction, prefix_consistent=True),
    "stratified": CountSchedule(stratified_fraction, prefix_consistent=False),
    "systematic": CountSchedule(systematic_fraction, prefix_consistent=False),
    "single": CountSchedule(
        single_fraction,
        prefix_consistent=True,
        over_blocks="same",
        note="gives all draws of a pair one masked count, the worst use of them; it exists for comparison.",
    ),
    "one_per_draw": CountSchedule(
        iid_fraction,
        prefix_consistent=True,
        over_blocks="same",
        note="gives all blocks of a draw one masked fraction, which is noisier; it exists for comparison.",
    ),
}


def step_items(seed: int, step: int, item_count: int, items_per_step: int) -> tuple[int, list[int]]:
    """The epoch of step `step` (from 0) and the items it visits.

    Every epoch visits every item once in an order of its own; its last step may be short. A function of its
    arguments: resuming needs no data position.
    """
    steps_per_epoch = math.ceil(item_count / items_per_step)
    epoch, within = divmod(step, steps_per_epoch)
    order = epoch_order(seed, epoch, item_count)
    return epoch, [int(i) for i in order[within * items_per_step : (within + 1) * items_per_step]]
