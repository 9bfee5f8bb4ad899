"""Reference log-likelihoods: the store that a run reads, and the filling of what it lacks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from laddpo.core.budget import TokenBudget
from laddpo.core.completions import CompletionObjective
from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item, lockstep, score_items
from laddpo.core.losses import LOSSES, LossOptions
from laddpo.core.noise import step_items
from laddpo.core.objectives import DpoObjective
from laddpo.core.tasks import is_completion, pair_item, responses_of, stored_pair
from laddpo.errors import RunFault, Stopped, UserError
from laddpo.inputs.margins import WINDOW
from laddpo.inputs.policy import Loaded
from laddpo.preference.encoding.encode import EncodedPair
from laddpo.preference.prepared import PreparedPairs
from laddpo.processes.progress import Progress
from laddpo.processes.ranks import ALONE, Ranks, share_out
from laddpo.processes.signals import StopFlag
from laddpo.settings.read_settings import command_of
from laddpo.settings.schema import DpoSettings, QuantizationSettings
from laddpo.storage.reference_store import NOTHING_STORED, ReferenceStore, StoredPair

TRAINING = "training pairs"
PAIRS_PER_SHARD = 512


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
    a signal, with everything computed so far in the store. Each rank computes and stores its share of every
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
    return Stopped(kept, "The same command continues from there.")


def own_pairs(pairs: Sequence[EncodedPair], ranks: Ranks) -> Sequence[EncodedPair]:
    """This rank's share of a window, as `core/sharing.py` will share out its items."""
    if ranks.world == 1:
        return pairs
    sizes = [sum(len(pair.prompt_ids) + len(response) for response in responses_of(pair)) for pair in pairs]
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


def training_estimator(dpo: DpoSettings, seed: int, block_length: int) -> ElboEstimator:
    """The policy's draws during training. `block_length` of the model, 0 for a bidirectional one.

    A single completion has no other side: nothing is shared with it, and nothing differs from it.
    """
    of_sides = {"shared_counts": False}
    if LOSSES[dpo.loss].takes_pairs:
        of_sides = {name: getattr(dpo, name) for name in ("shared_counts", "shared_masks", "difference_focus")}
    return ElboEstimator(
        dpo.estimator,
        dpo.schedule,
        dpo.diffusion_samples,
        seed,
        mask_rounds=dpo.mask_rounds,
        count_tilt=dpo.count_tilt,
        block_length=block_length,
        **of_sides,
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
        windows: Sequence[tuple[list[EncodedPair], range]],
        stop: StopFlag,
        label: str,
    ) -> None:
        """Compute what the store lacks for these windows of pairs, saying how much that is, and why."""
        loaded, ranks = self.loaded, self.loaded.machine.ranks
        absent = [
            stored_pair(pair) for pairs, draws in windows for pair in pairs if store.missing(stored_pair(pair), draws)
        ]
        lacking = max(ranks.gather(len(absent)))  # another run may be adding to the store while the ranks look
        total = sum(len(pairs) for pairs, _ in windows)
        unit = "rows" if any(is_completion(pair) for pairs, _ in windows for pair in pairs[:1]) else "pairs"
        is_training, label = label == TRAINING, label.replace(TRAINING, f"training {unit}")
        if not lacking:
            print(f"reference, {label}: all {total} {unit} are in {store.folder}")
            return
        if not self.auto:
            raise UserError(
                f"{store.folder}: {lacking} of {total} {unit} ({label}) have no reference values yet and auto is "
                f"false. Run {command_of('precompute')}, or set auto=true."
            )
        meaning = "" if len(store) else " (log-likelihoods before training, which later runs reuse)"
        print(f"reference, {label}: computing {lacking} of {total} {unit} into {store.folder}{meaning}")
        why = store.why_missing(absent)
        if is_training and why != NOTHING_STORED:  # evaluations have draws of their own
            print(f"reference, {label}: {why}")

        progress = Progress(total=total, unit=unit, desc="reference", dynamic_ncols=True, disable=not ranks.is_main)
        with progress:
            fill_reference(
                loaded.denoiser,
                store,
                windows,
                estimator,
                loaded.machine.token_budget,
                stop,
                PAIRS_PER_SHARD,
                progress.update,
                ranks,
            )
        if ranks.world > 1:
            ranks.barrier()
            store.refresh()

    def complete_training(
        self,
        store: ReferenceStore,
        estimator: ElboEstimator,
        rows: Sequence[Sequence[EncodedPair] | None],
        visited: Sequence[tuple[int, Sequence[int]]],
        stop: StopFlag,
    ) -> None:
        """Compute what the store lacks for the steps `visited`: of the training rows, and of those mismatched."""
        for of_kind, label in zip(rows, (TRAINING, "the same prompts with other completions"), strict=True):
            if of_kind is not None:
                draws = [estimator.draw_indices(epoch) for epoch, _ in visited]
                windows = [([of_kind[i] for i in step], n) for (_, step), n in zip(visited, draws, strict=True)]
                self.complete(store, estimator, windows, stop, label)

    def items(self, pairs: Sequence[EncodedPair], estimator: ElboEstimator, stop: StopFlag, label: str) -> list[Item]:
        """Pairs with the reference's values under an evaluation's own draws."""
        if not pairs:
            return []
        draws, store = estimator.draw_indices(0), self.store(estimator)
        windows = [(list(pairs[start : start + WINDOW]), draws) for start in range(0, len(pairs), WINDOW)]
        self.complete(store, estimator, windows, stop, label)
        return [pair_item(pair, estimator, draws, store.values(stored_pair(pair), draws)) for pair in pairs]
