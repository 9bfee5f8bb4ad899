"""The store of reference log-likelihoods: one float64 per (pair, side, draw), computed once, read by every run.

A store of shards (laddpo/storage/shards.py), to which more pairs and more draws are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from laddpo.errors import UserError
from laddpo.storage.shards import ShardStore, StoredPair

SIDES = ("chosen", "rejected")


class ReferenceStore(ShardStore):
    """Reads and grows one store; as `ShardStore` says. Of a pair it has an array with NaN where a draw is lacking.
    # float64 [sides, draws]"""

    kind, prefix, noun, facts = "reference", "shard", "reference values", ("first_draw",)

    def missing(self, pair: StoredPair, draws: Iterable[int]) -> list[int]:
        """The draws of this pair that the store lacks."""
        values = self._values.get(pair)
        if values is None:
            return list(draws)
        return [draw for draw in draws if draw >= values.shape[1] or np.isnan(values[:, draw]).any()]

    def values(self, pair: StoredPair, draws: Iterable[int]) -> np.ndarray:
        """The reference's value of each draw. # float64 [sides, draws]. Raises `UserError` when one is absent."""
        draws = list(draws)
        absent = self.missing(pair, draws)
        if absent:
            raise UserError(
                f"{self.folder}: has no reference value for pair {pair.id}, draws {absent}. "
                "Run python -m laddpo.precompute with the same settings, or leave auto=true."
            )
        return self._values[pair][:, draws]

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
        end = first_draw + values.shape[2]
        for pair, row in zip(pairs, values, strict=True):
            known = self._values.get(pair)
            if known is None or known.shape[1] < end:
                grown = np.full((len(row), end), np.nan)
                if known is not None:
                    grown[:, : known.shape[1]] = known
                self._values[pair] = known = grown
            known[:, first_draw:end] = row
