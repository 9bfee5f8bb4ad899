"""The surprising tokens of a run's rows: read from their store, and found first for rows that it lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from laddpo.core.budget import TokenBudget
from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import Denoiser
from laddpo.core.surprise import surprise_estimator, surprising_positions, token_surprise
from laddpo.core.tasks import pair_item, stored_pair
from laddpo.inputs import filling
from laddpo.inputs.filling import KINDS_OF_ROWS, PAIRS_PER_SHARD, Pass, fill_store
from laddpo.inputs.reference_values import Reference
from laddpo.preference.encoding.encode import EncodedPair
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.processes.signals import StopFlag
from laddpo.storage.shards import StoredPair
from laddpo.storage.surprise_store import Surprise, SurpriseStore

PASS = Pass("surprise", "surprising tokens", "the tokens that the model before training finds least likely")


class RowsWithSets(Sequence):
    """Rows that carry their surprising tokens, as they are stored."""

    def __init__(self, rows: Sequence[EncodedPair], store: SurpriseStore):
        self._rows, self._store = rows, store

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> EncodedPair:
        row = self._rows[index]
        return dataclasses.replace(row, favoured=self._store.positions(stored_pair(row)))


def complete(
    reference: Reference,
    estimator: ElboEstimator,
    rows: Sequence[Sequence[EncodedPair] | None],
    visited: Sequence[tuple[int, Sequence[int]]],
    stop: StopFlag,
) -> Sequence[Sequence[EncodedPair] | None]:
    """The training rows, and those mismatched, with the sets of all that the steps `visited` take: what the store lacks
    is found now. The rows as they are, if masks favour no surprising tokens."""
    if not estimator.surprise_focus:
        return rows
    store, loaded = open_store(reference, estimator), reference.loaded
    for of_kind, label in zip(rows, KINDS_OF_ROWS, strict=True):
        if of_kind is None:
            continue
        draws = range(estimator.surprise_draws)
        windows = filling.Windows(of_kind, [(step, draws) for epoch, step in visited if epoch == 0])

        def fill(advance, windows=windows) -> None:
            asked = (loaded.machine.token_budget, stop, PAIRS_PER_SHARD, advance, loaded.machine.ranks)
            fill_sets(loaded.denoiser, store, windows, estimator, *asked)

        filling.complete(PASS, store, windows, fill, label, reference.auto, loaded.machine.ranks)
    return [None if of_kind is None else RowsWithSets(of_kind, store) for of_kind in rows]


def known(reference: Reference, estimator: ElboEstimator, rows: Sequence[EncodedPair]) -> Sequence[EncodedPair]:
    """The rows whose sets are stored, with them; all rows, if masks favour no surprising tokens."""
    if not estimator.surprise_focus:
        return rows
    store = open_store(reference, estimator)
    return RowsWithSets([row for row in rows if stored_pair(row) in store], store)


def open_store(reference: Reference, estimator: ElboEstimator) -> SurpriseStore:
    """The store of the sets. Its key is that of reference values under the draws that tell surprise, with how many
    these are, and with the share of tokens."""
    of_sets = {name: getattr(estimator, name) for name in ("surprise_share", "surprise_draws")}
    fields = {**reference.fields(surprise_estimator(estimator)), **of_sets}
    return SurpriseStore.open(Path(reference.data_dir) / "surprise", fields)


def fill_sets(
    denoiser: Denoiser,
    store: SurpriseStore,
    windows: Iterable[tuple[Sequence[EncodedPair], range]],
    estimator: ElboEstimator,
    token_budget: int | TokenBudget,
    stop: StopFlag,
    pairs_per_shard: int,
    advance,
    ranks: Ranks = ALONE,
) -> None:
    """Find what the store lacks of the pairs of each window, as `fill_store` says."""
    telling, budget = surprise_estimator(estimator), TokenBudget.of(token_budget)

    def compute(pairs: Sequence[EncodedPair], draws: range) -> Iterator[list[tuple[StoredPair, list[Surprise]]]]:
        lacking = [pair for pair in pairs if stored_pair(pair) not in store]
        if lacking:
            found = token_surprise(denoiser, [pair_item(pair, telling, draws) for pair in lacking], budget)
            yield [(stored_pair(pair), _sets(sides)) for pair, sides in zip(lacking, found, strict=True)]

    def _sets(sides) -> list[Surprise]:
        share = estimator.surprise_share
        return [Surprise(sums, counts, surprising_positions(sums, counts, share)) for sums, counts in sides]

    def append(pending: list[tuple[StoredPair, list[Surprise]]]) -> None:
        if pending:
            store.append(dict(pending))

    fill_store(denoiser, store, windows, compute, append, budget, stop, pairs_per_shard, advance, ranks)
