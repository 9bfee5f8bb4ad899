"""The store of surprising tokens: of each response the positions that masks favour, and what they were chosen by.

A store of shards (laddpo/storage/shards.py). A set is never computed twice: where two processes found one for the same
pair, the one that was stored first counts, since reference values belong to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.errors import UserError
from laddpo.storage.shards import ShardStore, StoredPair


@dataclass(frozen=True)
class Surprise:
    """Of one response: the sum of -log p of every token over the draws that hide it, their number, and the positions
    of the tokens that count as surprising. # float32 [L], int32 [L], int64 ascending"""

    sums: np.ndarray
    counts: np.ndarray
    positions: np.ndarray


class SurpriseStore(ShardStore):
    """Reads and grows one store; as `ShardStore` says. Of a pair it has a `Surprise` of each side."""

    kind, prefix, noun = "surprise", "set", "sets of tokens"

    def __init__(self, folder: Path, fields: Mapping[str, Any]):
        self._sets: list[tuple[Surprise, ...]] = []
        super().__init__(folder, fields)

    def of(self, pair: StoredPair) -> tuple[Surprise, ...]:
        """What is stored of each side. Raises `UserError` when the pair is absent."""
        if pair not in self:
            raise UserError(
                f"{self.folder}: has no surprising tokens of pair {pair.id}. Run python -m laddpo.precompute with the "
                "same settings, or leave auto=true."
            )
        return self._sets[self._places[pair.key]]

    def positions(self, pair: StoredPair) -> tuple[np.ndarray, ...]:
        """The surprising tokens of each side. # int64, ascending"""
        return tuple(side.positions for side in self.of(pair))

    def append(self, found: Mapping[StoredPair, Sequence[Surprise]]) -> None:
        """Add a shard of the pairs that no other process has stored meanwhile."""
        for pair, sides in found.items():
            wrong = [total for side in sides for total in side.sums if not (np.isfinite(total) and total >= 0)]
            if wrong:
                raise UserError(
                    f"the reference's surprise at a token of pair {pair.id} is {wrong[0]}, expected a finite number "
                    ">= 0. The model's weights or the compute precision are broken for this text; check "
                    "hardware.precision and model.model_name_or_path."
                )
        with self._growing():
            self._read_listed()
            new = [pair for pair in found if pair not in self]
            if new:
                self._write_shard(new, _packed([found[pair] for pair in new]))

    def _add(self, pairs: Sequence[StoredPair], tensors: Mapping[str, np.ndarray]) -> None:
        sizes = tensors["lengths"], tensors["set_sizes"]  # [pairs, sides]
        ends = [np.cumsum(size.ravel())[:-1] for size in sizes]
        sides = zip(
            np.split(tensors["sums"], ends[0]),
            np.split(tensors["counts"], ends[0]),
            np.split(tensors["positions"], ends[1]),
            strict=True,
        )
        for pair in pairs:
            stored = tuple(Surprise(*next(sides)) for _ in range(sizes[0].shape[1]))
            if self._place(pair) == len(self._sets):
                self._sets.append(stored)


def _packed(found: Sequence[Sequence[Surprise]]) -> dict[str, np.ndarray]:
    """All sides end to end, with their lengths."""
    sides = [side for of_pair in found for side in of_pair]
    kinds = {"sums": np.float32, "counts": np.int32, "positions": np.int64}
    sizes = {"lengths": [len(side.sums) for side in sides], "set_sizes": [len(side.positions) for side in sides]}
    return {
        **{name: np.concatenate([getattr(side, name) for side in sides]).astype(kind) for name, kind in kinds.items()},
        **{name: np.array(size, dtype=np.int64).reshape(len(found), -1) for name, size in sizes.items()},
    }
