"""The two things that are trained: DPO on preference pairs and SFT on single responses, as tasks of the training loop.

Also the pass that both the reference store and evaluation use: encoded rows and draws in, per-draw log-likelihoods out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.draws import ElboEstimator, differing_positions
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item, lockstep, score_items
from laddpo.core.loop import step_items
from laddpo.core.metrics import preference_metrics
from laddpo.core.objectives import DpoObjective, SftObjective, loss_std_error
from laddpo.core.sharing import accumulate_shared
from laddpo.errors import RunFault, Stopped
from laddpo.processes.ranks import ALONE, Ranks, share_out
from laddpo.processes.signals import StopFlag
from laddpo.storage.reference_store import SIDES, ReferenceStore, StoredPair, token_digest

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedExample, EncodedPair

RESPONSE = "response"  # the side of an SFT row in its noise key


def pair_item(
    pair: EncodedPair, estimator: ElboEstimator, draws: Sequence[int], reference: np.ndarray | None = None
) -> Item:
    """A pair under the draws `draws`. # reference float64 [2, draws]"""
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    sides = tuple(
        estimator.sequences(pair.id, side, pair.prompt_ids, response, draws, differing_positions(response, other))
        for side, response, other in zip(SIDES, (chosen, rejected), (rejected, chosen), strict=True)
    )
    return Item(pair.id, sides, reference)


def example_item(row: EncodedExample, estimator: ElboEstimator, draws: Sequence[int]) -> Item:
    """An SFT row under the draws `draws`."""
    return Item(row.id, (estimator.sequences(row.id, RESPONSE, row.prompt_ids, row.response_ids, draws),))


def stored_pair(pair: EncodedPair) -> StoredPair:
    """The address of a pair's reference values: its id and the digest of its tokens."""
    return StoredPair(pair.id, token_digest(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))


@dataclass(frozen=True)
class DpoTask:
    """DPO on `pairs` against stored reference values.

    With common random numbers the store was filled with the draws of `estimator`; otherwise with the same indices of
    another stream.
    """

    denoiser: Denoiser
    parameters: Mapping[str, Tensor]
    pairs: Sequence[EncodedPair]
    store: ReferenceStore
    estimator: ElboEstimator
    objective: DpoObjective
    token_budget: int | TokenBudget
    backward: str = "stream"
    ranks: Ranks = ALONE

    @property
    def item_count(self) -> int:
        return len(self.pairs)

    def names(self, indices: Sequence[int]) -> list[str]:
        """The pair ids, for messages."""
        return [self.pairs[i].id for i in indices]

    def items(self, indices: Sequence[int], epoch: int) -> list[Item]:
        """The pairs with their draws of this epoch and the reference's value of each."""
        draws = self.estimator.draw_indices(epoch)
        return [
            pair_item(self.pairs[i], self.estimator, draws, self.store.values(stored_pair(self.pairs[i]), draws))
            for i in indices
        ]

    def accumulate(self, indices: Sequence[int], epoch: int, loss_scale: float) -> dict[str, float]:
        """Gradient of the mean loss of these pairs, times `loss_scale`; metrics of the step."""
        items = self.items(indices, epoch)
        values = accumulate_shared(
            self.denoiser,
            list(self.parameters.values()),
            items,
            self.objective,
            loss_scale / len(items),
            self.token_budget,
            self.backward,
            self.ranks,
        )
        metrics = preference_metrics(items, values.draws, values.losses, self.objective.beta, self.estimator.block)
        error = loss_std_error(self.objective, items, values.draws, self.estimator.block)
        if error is not None:
            metrics["loss/std_error"] = error
        return {**metrics, "tokens": sum(item.tokens for item in items), "items": len(items)}


@dataclass(frozen=True)
class SftTask:
    """The negative ELBO per token of single responses."""

    denoiser: Denoiser
    parameters: Mapping[str, Tensor]
    examples: Sequence[EncodedExample]
    estimator: ElboEstimator
    token_budget: int | TokenBudget
    backward: str = "stream"
    ranks: Ranks = ALONE

    @property
    def item_count(self) -> int:
        return len(self.examples)

    def names(self, indices: Sequence[int]) -> list[str]:
        """The row ids, for messages."""
        return [self.examples[i].id for i in indices]

    def items(self, indices: Sequence[int], epoch: int) -> list[Item]:
        """The rows with their draws of this epoch."""
        draws = self.estimator.draw_indices(epoch)
        return [example_item(self.examples[i], self.estimator, draws) for i in indices]

    def accumulate(self, indices: Sequence[int], epoch: int, loss_scale: float) -> dict[str, float]:
        """Gradient of the mean loss of these rows, times `loss_scale`; metrics of the step."""
        items = self.items(indices, epoch)
        values = accumulate_shared(
            self.denoiser,
            list(self.parameters.values()),
            items,
            SftObjective(),
            loss_scale / len(items),
            self.token_budget,
            self.backward,
            self.ranks,
        )
        tokens = sum(item.tokens for item in items)
        return {"loss": float(values.losses.mean()), "tokens": tokens, "items": len(items)}


def visited_windows(
    seed: int, steps: int, item_count: int, items_per_step: int, mask_rounds: int
) -> list[tuple[int, list[int]]]:
    """(epoch, item indices) of every optimizer step, in order, each item once per round of masks.

    The reference is computed in these windows, so that its packing, and therefore every bit of its values on a CPU,
    equals the policy's in the first epoch.
    """
    windows = []
    for step in range(steps):
        epoch, indices = step_items(seed, step, item_count, items_per_step)
        if epoch >= mask_rounds:
            break
        windows.append((epoch, indices))
    return windows


def fill_reference(
    denoiser: Denoiser,
    store: ReferenceStore,
    windows: Iterable[tuple[Sequence[EncodedPair], range]],
    estimator: ElboEstimator,
    token_budget: int | TokenBudget,
    stop: StopFlag,
    pairs_per_shard: int,
    advance,
    ranks: Ranks = ALONE,
) -> int:
    """Compute what the store lacks of each window (pairs, draws); the number of forward sequences that took.

    Appends a shard every `pairs_per_shard` pairs. `advance(pairs)` is told of every window done. Raises `Stopped` after
    a signal, with everything computed so far in the store. Of several ranks each computes and stores its share of every
    window, the one that it will have in training; what the others stored is seen after `store.refresh()`.
    """
    budget = TokenBudget.of(token_budget)
    pending: list[tuple[StoredPair, int, np.ndarray]] = []
    sequences = 0
    for pairs, draws in windows:
        by_draws: dict[tuple[int, ...], list[EncodedPair]] = {}
        for pair in own_pairs(pairs, ranks):
            for run in _consecutive(store.missing(stored_pair(pair), draws)):
                by_draws.setdefault(run, []).append(pair)
        with lockstep(denoiser), budget.stoppable(stop, ranks), kept_when_stopped(store, pending, stop):
            for run, group in by_draws.items():
                items = [pair_item(pair, estimator, run) for pair in group]
                values = score_items(denoiser, items, budget).cpu().numpy()
                sequences += values.size
                pending += [(stored_pair(pair), run[0], row) for pair, row in zip(group, values, strict=True)]
        try:  # asked once: a signal after this line lets the next window be computed
            is_stopping = ranks.agree_to_stop(stop)
        except RunFault:  # another rank died: what this one has is kept
            _append(store, pending)
            raise
        if len(pending) >= pairs_per_shard or is_stopping:
            _append(store, pending)
            pending = []
        advance(len(pairs))
        if is_stopping:
            raise _stored(store, stop)
    _append(store, pending)
    return sequences


@contextlib.contextmanager
def kept_when_stopped(store: ReferenceStore, pending: list[tuple[StoredPair, int, np.ndarray]], stop: StopFlag):
    """A stop in the middle of a window keeps what was computed before, the whole groups of this window included."""
    try:
        yield
    except Stopped:
        _append(store, pending)
        raise _stored(store, stop) from None


def _stored(store: ReferenceStore, stop: StopFlag) -> Stopped:
    kept = f"{store.folder}: stopped by {stop.name}; {len(store)} pairs are stored."
    return Stopped(kept, "The same command goes on from there.")


def own_pairs(pairs: Sequence[EncodedPair], ranks: Ranks) -> Sequence[EncodedPair]:
    """This rank's share of a window, as `core/sharing.py` will share out its items."""
    if ranks.world == 1:
        return pairs
    sizes = [2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    return [pairs[i] for i in share_out(sizes, ranks.world)[ranks.rank]]


def _consecutive(draws: Sequence[int]) -> list[tuple[int, ...]]:
    """Runs of neighbouring indices. Example: [0, 1, 4, 5] -> [(0, 1), (4, 5)]."""
    runs = groupby(enumerate(draws), key=lambda place: place[1] - place[0])
    return [tuple(draw for _, draw in run) for _, run in runs]


def _append(store: ReferenceStore, pending: list[tuple[StoredPair, int, np.ndarray]]) -> None:
    by_draws: dict[tuple[int, int], list[tuple[StoredPair, np.ndarray]]] = {}
    for pair, first, row in pending:
        by_draws.setdefault((first, row.shape[1]), []).append((pair, row))
    for (first, _), rows in by_draws.items():
        store.append([pair for pair, _ in rows], first, np.stack([row for _, row in rows]))
