"""Reference log-likelihoods: the store that a run reads, and the filling of what it lacks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from laddpo.core.budget import TokenBudget
from laddpo.core.completions import CompletionObjective
from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item, score_items
from laddpo.core.losses import LOSSES, LossOptions
from laddpo.core.noise import step_items
from laddpo.core.objectives import DpoObjective
from laddpo.core.tasks import pair_item, stored_pair
from laddpo.inputs import filling
from laddpo.inputs.filling import KINDS_OF_ROWS, PAIRS_PER_SHARD, Pass, Windows, fill_store
from laddpo.inputs.margins import WINDOW
from laddpo.inputs.policy import Loaded
from laddpo.preference.encoding.encode import EncodedPair
from laddpo.preference.prepared import PreparedPairs
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.processes.signals import StopFlag
from laddpo.settings.schema import DpoSettings, QuantizationSettings
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.shards import StoredPair

PASS = Pass("reference", "reference values", "log-likelihoods before training")


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

    The rest is as `fill_store` says.
    """
    budget, sequences = TokenBudget.of(token_budget), []

    def compute(pairs: Sequence[EncodedPair], draws: range) -> Iterator[list[tuple[StoredPair, int, np.ndarray]]]:
        by_draws: dict[tuple[int, ...], list[EncodedPair]] = {}
        for pair in pairs:
            for run in _consecutive(store.missing(stored_pair(pair), draws)):
                by_draws.setdefault(run, []).append(pair)
        for run, group in by_draws.items():
            items = [pair_item(pair, estimator, run) for pair in group]
            values = score_items(denoiser, items, budget).cpu().numpy()
            sequences.append(values.size)
            yield [(stored_pair(pair), run[0], row) for pair, row in zip(group, values, strict=True)]

    append = functools.partial(_append, store)
    fill_store(denoiser, store, windows, compute, append, budget, stop, pairs_per_shard, advance, ranks)
    return sum(sequences)


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


def training_estimator(dpo: DpoSettings, seed: int, block_length: int) -> ElboEstimator:
    """The policy's draws during training. `block_length` of the model, 0 for a bidirectional one.

    A single completion has no other side: nothing is shared with it, and nothing differs from it.
    """
    takes_pairs = LOSSES[dpo.loss].takes_pairs
    names = ("shared_counts", "shared_masks") if takes_pairs else ()
    if dpo.focus == "surprise":
        names += ("surprise_focus", "surprise_share", "surprise_draws")
    elif dpo.focus == "difference" and takes_pairs:
        names += ("difference_focus",)
    return ElboEstimator(
        dpo.estimator,
        dpo.schedule,
        dpo.diffusion_samples,
        seed,
        mask_rounds=dpo.mask_rounds,
        count_tilt=dpo.count_tilt,
        block_length=block_length,
        **{"shared_counts": False, **{name: getattr(dpo, name) for name in names}},
    )


def reference_estimator(dpo: DpoSettings, seed: int, block_length: int) -> ElboEstimator:
    """The reference's draws: the policy's own, or an independent stream without common random numbers."""
    policy = training_estimator(dpo, seed, block_length)
    return policy if dpo.common_random_numbers else dataclasses.replace(policy, stream="/reference")


def objective_of(dpo: DpoSettings) -> DpoObjective | CompletionObjective:
    """The loss of these settings, of pairs or of completions."""
    if LOSSES[dpo.loss].takes_pairs:
        return DpoObjective(dpo.loss, loss_options(dpo))
    of_baseline = (dpo.kl_baseline,) if LOSSES[dpo.loss].has_baseline else ()
    return CompletionObjective(dpo.loss, loss_options(dpo), *of_baseline)


def loss_options(dpo: DpoSettings) -> LossOptions:
    """The numbers of the loss. Settings that it does not read are not looked at and keep their defaults."""
    read = {name: getattr(dpo, name) for name in ("label_smoothing", *LOSSES[dpo.loss].reads)}
    return LossOptions(dpo.beta, dpo.sft_weight, **read)


@dataclass(frozen=True)
class Reference:
    """The reference model's values of prepared pairs: found in a store below `data_dir`, or computed with `loaded`.

    `loaded` must answer as the reference does. Where `auto` is false, values that lack are refused.
    """

    data_dir: str
    auto: bool
    quantization: QuantizationSettings
    prepared: PreparedPairs
    loaded: Loaded

    def store(self, estimator: ElboEstimator) -> ReferenceStore:
        """The store that holds, or will hold, the values under this estimator's draws."""
        return ReferenceStore.open(Path(self.data_dir) / "reference", self.fields(estimator))

    def fields(self, estimator: ElboEstimator) -> dict:
        """Everything that the values depend on: the key of the store.

        Not among it: which rows, their order, the number of draws, batch, learning rate, beta, loss, LoRA, memory
        settings.
        """
        quantization, loaded = self.quantization, self.loaded
        stored = "none"
        if quantization.load_in_4bit:
            stored = (
                f"{quantization.bnb_4bit_quant_type}, double {quantization.bnb_4bit_use_double_quant}, "
                f"compute {quantization.bnb_4bit_compute_dtype or 'default'}"
            )
        elif quantization.load_in_8bit:
            stored = f"int8, threshold {quantization.llm_int8_threshold}"
        precision = loaded.machine.precision
        if loaded.denoiser.autocast is not None:  # full fine-tuning: the same arithmetic rounds other things
            precision = f"{precision} autocast over fp32 weights"
        return {
            "encoding": self.prepared.manifest["fields"]["encoding"],
            "weights": loaded.weights,
            "quantization": stored,
            "precision": precision,
            "draws": estimator.store_fields(),
        }

    def complete(
        self,
        store: ReferenceStore,
        estimator: ElboEstimator,
        windows: Windows,
        stop: StopFlag,
        label: str,
    ) -> None:
        """Compute what the store lacks for these windows of pairs, saying how much that is, and why."""
        loaded, ranks = self.loaded, self.loaded.machine.ranks

        def fill(advance) -> None:
            asked = (estimator, loaded.machine.token_budget, stop, PAIRS_PER_SHARD, advance, ranks)
            fill_reference(loaded.denoiser, store, windows, *asked)

        filling.complete(PASS, store, windows, fill, label, self.auto, ranks)

    def complete_training(
        self,
        store: ReferenceStore,
        estimator: ElboEstimator,
        rows: Sequence[Sequence[EncodedPair] | None],
        visited: Sequence[tuple[int, Sequence[int]]],
        stop: StopFlag,
    ) -> None:
        """Compute what the store lacks for the steps `visited`: of the training rows, and of those mismatched."""
        for of_kind, label in zip(rows, KINDS_OF_ROWS, strict=True):
            if of_kind is not None:
                windows = Windows(of_kind, [(step, estimator.draw_indices(epoch)) for epoch, step in visited])
                self.complete(store, estimator, windows, stop, label)

    def items(self, pairs: Sequence[EncodedPair], estimator: ElboEstimator, stop: StopFlag, label: str) -> list[Item]:
        """Pairs with the reference's values under an evaluation's own draws."""
        if not pairs:
            return []
        draws, store = estimator.draw_indices(0), self.store(estimator)
        places = [range(start, min(start + WINDOW, len(pairs))) for start in range(0, len(pairs), WINDOW)]
        self.complete(store, estimator, Windows(pairs, [(place, draws) for place in places]), stop, label)
        return [pair_item(pair, estimator, draws, store.values(stored_pair(pair), draws)) for pair in pairs]
