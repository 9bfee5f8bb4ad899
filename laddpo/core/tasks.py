"""The two things that are trained: DPO on preference pairs and SFT on single responses, as tasks of the training loop.

Also the pass that both the reference store and evaluation use: encoded rows and draws in, per-draw log-likelihoods out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.draws import ElboEstimator, differing_positions
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item
from laddpo.core.metrics import preference_metrics
from laddpo.core.objectives import DpoObjective, SftObjective, loss_std_error
from laddpo.core.sharing import accumulate_shared
from laddpo.processes.ranks import ALONE, Ranks
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
