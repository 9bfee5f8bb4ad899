"""The store of reference log-likelihoods: one float64 per (pair, side, draw), computed once, read by every run.

A store of shards (laddpo/storage/shards.py), to which more pairs and more draws are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.errors import UserError
from laddpo.storage.shards import ShardStore, StoredPair

SIDES = ("chosen", "rejected")


class ReferenceStore(ShardStore):
    """Reads and grows one store; as `ShardStore` says. All values are one array, with NaN where a draw is lacking.
    # float64 [at least as many places as pairs, sides, draws]

    Pairs have two sides. Completions have one, and lie in the same store where their draws have the same law."""

    kind, prefix, noun, facts = "reference", "shard", "reference values", ("first_draw",)

    def __init__(self, folder: Path, fields: Mapping[str, Any]):
        self._values = np.empty((0, 0, 0))
        self._sides = bytearray()  # of each place
        super().__init__(folder, fields)

    def missing(self, pair: StoredPair, draws: Iterable[int]) -> list[int]:
        """The draws of this pair that the store lacks."""
        place = self._places.get(pair.key)
        if place is None:
            return list(draws)
        values = self._values[place, : self._sides[place]]
        return [draw for draw in draws if draw >= values.shape[1] or np.isnan(values[:, draw]).any()]

    def lacks(self, pair: StoredPair, draws: Sequence[int]) -> bool:
        return bool(self.missing(pair, draws))

    def values(self, pair: StoredPair, draws: Iterable[int]) -> np.ndarray:
        """The reference's value of each draw. # float64 [sides, draws]. Raises `UserError` when one is absent."""
        draws = list(draws)
        absent = self.missing(pair, draws)
        if absent:
            raise UserError(
                f"{self.folder}: has no reference value for pair {pair.id}, draws {absent}. "
                "Run python -m laddpo.precompute with the same settings, or leave auto=true."
            )
        place = self._places[pair.key]
        return self._values[place, : self._sides[place]][:, draws]

    def append(self, pairs: list[StoredPair], first_draw: int, values: np.ndarray) -> None:
        """Add a shard. # values float64 [pairs, sides, draws], for the draws first_draw, first_draw + 1, …

        A bound on a log-probability is never positive and never NaN: such values stop here, naming the pair.
        """
        wrong = ~np.isfinite(values) | (values > 0)
        if wrong.any():
            index = int(np.argwhere(wrong)[0][0])
            raise UserError(
                f"reference log-likelihood of pair {pairs[index].id} is {values[wrong][0]}, expected a finite number "
                "<= 0. The model's weights or the compute precision are broken for this text; check "
                "hardware.precision and model.model_name_or_path."
            )
        tensors = {
            "values": np.ascontiguousarray(values, dtype=np.float64),
            "first_draw": np.array([first_draw], dtype=np.int64),
        }
        with self._growing():
            self._write_shard(pairs, tensors)

    def _add(self, pairs: Sequence[StoredPair], tensors: Mapping[str, np.ndarray]) -> None:
        first_draw, values = int(tensors["first_draw"][0]), tensors["values"]
        places = [self._place(pair) for pair in pairs]
        sides, end = values.shape[1], first_draw + values.shape[2]
        self._sides.extend([sides] * (len(self._places) - len(self._sides)))
        self._make_room((len(self._places), sides, end))
        self._values[places, :sides, first_draw:end] = values

    def _make_room(self, needed: tuple[int, int, int]) -> None:
        """Grow the array to hold so many places, sides and draws; by half as many places again, so that growing costs
        little in sum."""
        had = self._values.shape
        if all(need <= size for need, size in zip(needed, had, strict=True)):
            return
        places = had[0] if needed[0] <= had[0] else max(needed[0], had[0] * 3 // 2)
        grown = np.full((places, max(needed[1], had[1]), max(needed[2], had[2])), np.nan)
        grown[: had[0], : had[1], : had[2]] = self._values
        self._values = grown
