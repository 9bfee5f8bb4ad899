"""What is trained: DPO on pairs, KTO on labelled completions, SFT on single responses, as tasks of the training loop.

Also the pass that both the reference store and evaluation use: encoded rows and draws in, per-draw log-likelihoods out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.completions import CompletionObjective, completion_metrics
from laddpo.core.draws import NO_POSITIONS, ElboEstimator
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item, Objective, StepValues
from laddpo.core.metrics import preference_metrics
from laddpo.core.objectives import DpoObjective, SftObjective, loss_std_error
from laddpo.core.sharing import accumulate_shared, score_shared
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.storage.reference_store import SIDES, ReferenceStore
from laddpo.storage.shards import StoredPair, token_digest

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedCompletion, EncodedExample, EncodedPair

RESPONSE = "response"  # the side of an SFT row in its noise key
COMPLETION = "completion"  # that of a labelled completion


def pair_item(
    pair: EncodedPair | EncodedCompletion,
    estimator: ElboEstimator,
    draws: Sequence[int],
    reference: np.ndarray | None = None,
) -> Item:
    """A pair, or a labelled completion, under the draws `draws`. # reference float64 [sides, draws]"""
    favoured = favoured_tokens(pair, estimator)
    if is_completion(pair):
        sequences = estimator.sequences(pair.id, COMPLETION, pair.prompt_ids, pair.completion_ids, draws, *favoured)
        return Item(pair.id, (sequences,), reference, pair.label, pair.weight)
    sides = tuple(
        estimator.sequences(pair.id, side, pair.prompt_ids, response, draws, of_side)
        for side, response, of_side in zip(SIDES, responses_of(pair), favoured, strict=True)
    )
    return Item(pair.id, sides, reference, weight=pair.weight, margin=pair.margin)


def favoured_tokens(
    row: EncodedPair | EncodedCompletion, estimator: ElboEstimator
) -> tuple[np.ndarray, np.ndarray] | tuple[np.ndarray]:
    """Positions of the tokens of each response that the masks favour: surprising ones, which the row carries, or those
    in which a pair's responses differ."""
    if estimator.surprise_focus:
        assert row.favoured is not None, f"{row.id} has no set of surprising tokens"
        return row.favoured
    if is_completion(row):
        return (NO_POSITIONS,)
    chosen, rejected = responses_of(row)
    return differing_positions(chosen, rejected), differing_positions(rejected, chosen)


def differing_positions(response: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where a response differs from the pair's other one, counted from its start. # int64, ascending

    Common beginning and end are cut off; what is left in between differs, but for equal tokens at equal places where
    both middles have one length. Example: [1, 2, 3, 9] against [1, 4, 3, 9] -> [1]; against [1, 4, 4, 3, 9] -> [1].
    """
    shorter = min(len(response), len(other))
    start = _equal_run(response[:shorter], other[:shorter])
    end = _equal_run(response[::-1][: shorter - start], other[::-1][: shorter - start])
    middle, other_middle = response[start : len(response) - end], other[start : len(other) - end]
    if len(middle) == len(other_middle):
        return start + np.flatnonzero(middle != other_middle)
    return start + np.arange(len(middle))


def _equal_run(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two arrays of one length."""
    unequal = np.flatnonzero(a != b)
    return int(unequal[0]) if len(unequal) else len(a)


def example_item(row: EncodedExample, estimator: ElboEstimator, draws: Sequence[int]) -> Item:
    """An SFT row under the draws `draws`."""
    return Item(row.id, (estimator.sequences(row.id, RESPONSE, row.prompt_ids, row.response_ids, draws),))


def is_completion(row: EncodedPair | EncodedCompletion) -> bool:
    """Whether a row is a single completion with a label, and no pair."""
    return hasattr(row, "completion_ids")


def responses_of(row: EncodedPair | EncodedCompletion) -> tuple[np.ndarray, ...]:
    """Token ids of each response of a row."""
    return (row.completion_ids,) if is_completion(row) else (row.chosen_ids, row.rejected_ids)


def differing_share(pairs: Iterable[EncodedPair]) -> float:
    """The share of an answer's tokens in which it differs from the other one, a mean over both answers of the pairs."""
    sides = ((a, b) for pair in pairs for a, b in (responses_of(pair), responses_of(pair)[::-1]))
    return float(np.mean([len(differing_positions(a, b)) / len(a) for a, b in sides]))


def stored_pair(pair: EncodedPair | EncodedCompletion) -> StoredPair:
    """The address of a row's reference values: its id and the digest of its tokens, and of its surprising ones."""
    return StoredPair(pair.id, token_digest(pair.prompt_ids, *responses_of(pair), *(pair.favoured or ())))


@dataclass(frozen=True)
class DpoTask:
    """DPO on `pairs` against stored reference values, or a loss without a reference, which has no store.

    With common random numbers the store was filled with the draws of `estimator`; otherwise with the same indices of
    another stream.
    """

    denoiser: Denoiser
    parameters: Mapping[str, Tensor]
    pairs: Sequence[EncodedPair]
    store: ReferenceStore | None
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
        """The pairs with their draws of this epoch and the reference's value of each, if there is a reference."""
        return self._with_reference([self.pairs[i] for i in indices], epoch)

    def _with_reference(self, rows: Sequence[EncodedPair | EncodedCompletion], epoch: int) -> list[Item]:
        draws, store = self.estimator.draw_indices(epoch), self.store
        references = [None if store is None else store.values(stored_pair(row), draws) for row in rows]
        return [pair_item(row, self.estimator, draws, values) for row, values in zip(rows, references, strict=True)]

    def accumulate(self, indices: Sequence[int], epoch: int, loss_scale: float) -> dict[str, float]:
        """Gradient of the mean loss of these pairs, times `loss_scale`; metrics of the step."""
        items = self.items(indices, epoch)
        values = self._gradient(items, self.objective, loss_scale)
        metrics = preference_metrics(items, values.draws, values.losses, self.objective.beta, self.estimator.block)
        return {**metrics, **self._facts(items, self.objective, values)}

    def _gradient(self, items: Sequence[Item], objective: Objective, loss_scale: float) -> StepValues:
        return accumulate_shared(
            self.denoiser,
            list(self.parameters.values()),
            items,
            objective,
            loss_scale / len(items),
            self.token_budget,
            self.backward,
            self.ranks,
        )

    def _facts(
        self, items: Sequence[Item], objective: DpoObjective | CompletionObjective, values: StepValues
    ) -> dict[str, float]:
        """The loss's error by its masks, where there is one, and how much was computed."""
        error = loss_std_error(objective, items, values.draws, self.estimator.block)
        known = {} if error is None else {"loss/std_error": error}
        return {**known, "tokens": sum(item.tokens for item in items), "items": len(items)}


@dataclass(frozen=True)
class CompletionTask(DpoTask):
    """Single completions with labels against stored reference values: `pairs` holds EncodedCompletions.

    `mismatched`: the rows that KTO's baseline is estimated from, one for each row; None where the loss has no baseline,
    or the mean of the step's own completions.
    """

    objective: CompletionObjective
    mismatched: Sequence[EncodedCompletion] | None = None

    def accumulate(self, indices: Sequence[int], epoch: int, loss_scale: float) -> dict[str, float]:
        """Gradient of the mean loss of these completions, times `loss_scale`; metrics of the step.

        The baseline takes one more forward for each draw, without a graph; all ranks get the same number.
        """
        items, objective, tokens = self.items(indices, epoch), self.objective, 0
        if objective.has_baseline:
            compared = items
            if self.mismatched is not None:
                compared = self._with_reference([self.mismatched[i] for i in indices], epoch)
            draws = score_shared(self.denoiser, compared, self.token_budget, self.ranks)
            objective, tokens = objective.at_baseline_of(compared, draws), sum(item.tokens for item in compared)
        values = self._gradient(items, objective, loss_scale)
        metrics = completion_metrics(items, values.draws, values.losses, objective, self.estimator.block)
        facts = self._facts(items, objective, values)
        return {**metrics, **facts, "tokens": facts["tokens"] + tokens}


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
