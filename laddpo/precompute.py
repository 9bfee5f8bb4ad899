"""Reference log-likelihoods, computed once for every pair and draw that a run will visit, and kept for all later runs.

    python -m laddpo.precompute
    python -m laddpo.precompute model=llada_8b hardware=rtx4080 dpo.diffusion_samples=8
    python -m laddpo.precompute verify=true          recompute a sample of what is stored and compare

A store serves every beta, loss, learning rate, LoRA rank and batch size; more pairs or draws are added to it.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.core.losses import LOSSES
from laddpo.errors import RunFault, UserError
from laddpo.settings.schema import RunConfig

VERIFIED_PAIRS = 32


def main(config: RunConfig, run_folder: Path) -> None:
    """Fill the store for the training pairs that the run visits and for its validation pairs."""
    import dataclasses

    from laddpo.hardware.machine import find_machine
    from laddpo.inputs import policy, reference_values, surprise_sets
    from laddpo.inputs.data import data_lengths
    from laddpo.inputs.reference_values import Reference
    from laddpo.processes.signals import stop_on_signal
    from laddpo.training.pairs import open_prepared

    if not LOSSES[config.dpo.loss].needs_reference:
        raise UserError(
            f"dpo.loss is {config.dpo.loss!r}, which compares with no reference: there is nothing to compute. Run "
            "python -m laddpo.train with these settings."
        )
    config = dataclasses.replace(config, auto=True)  # asked for by name: there is nothing to refuse
    policy.check_before_loading(config)
    prepared = open_prepared(config)
    machine = find_machine(config, data_lengths(prepared, config.dpo, config.model))
    print(f"machine: {machine}")
    loaded = policy.load(config, machine)
    estimator = reference_values.reference_estimator(config.dpo, config.seed, loaded.block_length)
    reference = Reference(config.paths.data_dir, config.auto, config.quantization, prepared, loaded)
    store = reference.store(estimator)
    if config.verify:
        verify(loaded, store, estimator, surprise_sets.known(reference, estimator, prepared.train))
    else:
        with stop_on_signal() as stop:
            fill(config, reference, store, estimator, stop)
    print(store.folder)


def fill(config: RunConfig, reference, store, estimator, stop) -> None:
    """Compute what the store lacks: for the pairs that training visits, and for those that are measured."""
    from laddpo.evaluation.base_and_tuned import training_sample
    from laddpo.hardware.planning import pairs_per_step
    from laddpo.inputs import surprise_sets
    from laddpo.inputs.data import mismatched_rows, training_rows
    from laddpo.inputs.margins import evaluation_estimator
    from laddpo.inputs.reference_values import visited_windows
    from laddpo.preference.prepared import PreparedUnpaired
    from laddpo.training.lengths import total_steps

    rows, optim, hardware = training_rows(reference.prepared, config.dpo), config.optim, config.hardware
    steps, per_step = total_steps(optim, hardware, len(rows)), pairs_per_step(optim, hardware)
    visited = visited_windows(config.seed, steps, len(rows), per_step, config.dpo.mask_rounds)
    of_kinds = (rows, mismatched_rows(rows, config.dpo))
    of_kinds = surprise_sets.complete(reference, estimator, of_kinds, visited, stop)
    reference.complete_training(store, estimator, of_kinds, visited, stop)

    block_length = reference.loaded.block_length
    of_evaluation = evaluation_estimator(config.evaluation.diffusion_samples, config.seed, block_length)
    held_out = list(reference.prepared.validation)[: config.evaluation.num_pairs]
    reference.items(held_out, of_evaluation, stop, f"validation {reference.prepared.noun}")
    if config.evaluation.at_end:
        test = list(reference.prepared.test)[: config.evaluation.num_pairs]
        reference.items(test, of_evaluation, stop, f"test {reference.prepared.noun}")
        if not isinstance(reference.prepared, PreparedUnpaired):
            seen = training_sample(config.seed, reference.prepared)
            reference.items(seen, of_evaluation, stop, "training pairs of the evaluation")


def verify(loaded, store, estimator, pairs) -> None:
    """Recompute stored values of a sample of pairs on this machine and compare; `RunFault` when they differ."""
    import numpy as np

    from laddpo.core.sharing import score_shared
    from laddpo.core.tasks import pair_item, stored_pair
    from laddpo.training.faults import STEP_ZERO_TOLERANCE

    draws = estimator.draw_indices(0)
    known = [pair for pair in pairs if not store.missing(stored_pair(pair), draws)]
    step = max(1, len(known) // VERIFIED_PAIRS)
    sample = known[::step][:VERIFIED_PAIRS]
    if not sample:
        print(f"{store.folder}: holds no values for these pairs yet; nothing to verify")
        return
    items = [pair_item(pair, estimator, draws) for pair in sample]
    now = score_shared(loaded.denoiser, items, loaded.machine.token_budget, loaded.machine.ranks).cpu().numpy()
    stored = np.stack([store.values(stored_pair(pair), draws) for pair in sample])
    difference = np.abs(now - stored)
    relative = float((difference / np.maximum(1.0, np.abs(stored))).max())
    tolerance = STEP_ZERO_TOLERANCE[loaded.machine.precision]
    largest = f"largest difference {difference.max():.3g} nats, relative {relative:.2g}"
    summary = f"{len(sample)} pairs, {stored.size} values: {largest}"
    if relative > tolerance:
        worst = sample[int(difference.max(axis=(1, 2)).argmax())].id
        raise RunFault(
            f"{store.folder}: {summary}, allowed {tolerance:g} in {loaded.machine.precision}; worst pair {worst}. "
            "Remove the folder and run python -m laddpo.precompute again."
        )
    print(f"{store.folder}: verified {summary}")


if __name__ == "__main__":
    run_stage("precompute", main)
