"""One training run in named steps, from the settings to the sealed folder; train and sft share them.

    open_pairs -> open_model -> fill_reference -> build_task -> check_step_zero -> run_loop -> finish

What differs between pairs and rows is in the first steps: laddpo/training/rows.py has those of sft.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laddpo.core.completions import CompletionObjective
from laddpo.core.loop import LoopSettings, LoopState, train_loop
from laddpo.core.losses import LOSSES
from laddpo.core.objectives import DpoObjective
from laddpo.core.optim import build_optimizer
from laddpo.core.tasks import CompletionTask, DpoTask, SftTask, pair_item
from laddpo.errors import Stopped
from laddpo.evaluation import base_and_tuned
from laddpo.evaluation.winrate import with_prompts
from laddpo.hardware import machine as machines
from laddpo.hardware.footprint import StepMemory
from laddpo.hardware.machine import Machine
from laddpo.hardware.planning import Lengths, pairs_per_step
from laddpo.inputs import pins, policy, reference_values, surprise_sets
from laddpo.inputs.data import data_lengths, given_template, mismatched_rows, training_rows
from laddpo.inputs.margins import evaluation_estimator
from laddpo.inputs.policy import Loaded
from laddpo.inputs.reference_values import Reference
from laddpo.inputs.tuned import tuned_weights
from laddpo.preference.prepared import PreparedPairs
from laddpo.processes.ranks import Ranks
from laddpo.processes.signals import StopFlag
from laddpo.results import plots
from laddpo.settings.compose import write_config
from laddpo.settings.of_a_run import write_command
from laddpo.settings.read_settings import given_overrides
from laddpo.settings.schema import RunConfig
from laddpo.storage import manifests
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.run_outputs import RunOutputs
from laddpo.training.faults import fault_reports, step_zero_check
from laddpo.training.lengths import total_steps, warmup_note
from laddpo.training.outputs import SEALED, check_weights, open_trackers, resume_step, run_outputs, watch_of
from laddpo.training.pairs import (
    check_enough,
    check_margins,
    open_prepared,
    say_what_is_measured,
    say_what_pairs_are_like,
)
from laddpo.training.tracking import Trackers, log_results
from laddpo.training.validation import LOSS, Validation, open_validation


@dataclass(frozen=True)
class RunData:
    """What a run learns from. `items`: encoded pairs or rows. `content` is their hash in fingerprints. `prepared`:
    their folder, None of a generated corpus. `tasks`: the test tasks that base and tuned model answer at the end.
    `held_out`: rows whose loss chooses the checkpoint. `from_scratch`: the model begins as random weights.
    `mismatched`: as in CompletionTask."""

    items: Sequence[Any]
    content: str
    lengths: Lengths
    prepared: PreparedPairs | None
    tasks: Sequence[Any] = ()
    held_out: Sequence[Any] = ()
    from_scratch: bool = False
    mismatched: Sequence[Any] | None = None


@dataclass(frozen=True)
class Run:
    """A run with its data and its model. `pins`: the fingerprints of all that it was begun with."""

    config: RunConfig
    folder: Path
    is_resumed: bool
    stop: StopFlag
    data: RunData
    pins: Mapping[str, Any]
    loaded: Loaded

    @property
    def machine(self) -> Machine:
        return self.loaded.machine

    @property
    def ranks(self) -> Ranks:
        return self.machine.ranks


@dataclass(frozen=True)
class Training:
    """A task with all that the loop takes beside it. `unit` names what a step counts; `watch` measures memory."""

    task: DpoTask | SftTask
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    settings: LoopSettings
    validation: Validation
    unit: str = "pairs"
    watch: Callable[[bool], AbstractContextManager[dict[str, float]]] | None = None


@dataclass(frozen=True)
class Ended:
    """How the loop ended, and the logs that it wrote."""

    state: LoopState
    outputs: RunOutputs


def open_pairs(config: RunConfig) -> RunData:
    """The prepared pairs, and the test tasks; refuses what cannot work before minutes go by."""
    policy.check_before_loading(config, hash_again=True)
    tasks = base_and_tuned.open_tasks(config) if config.evaluation.at_end and not config.dry_run else []

    prepared = open_prepared(config)
    check_enough(config, prepared)
    check_margins(config.dpo.loss, prepared)
    say_what_is_measured(config, prepared)
    say_what_pairs_are_like(config, prepared)
    tasks = with_prompts(tasks, prepared, config.evaluation)
    lengths = data_lengths(prepared, config.dpo, config.model)
    rows = training_rows(prepared, config.dpo)
    return RunData(
        rows,
        prepared.content,
        lengths,
        prepared,
        tasks,
        mismatched=mismatched_rows(rows, config.dpo),
    )


def open_model(config: RunConfig, folder: Path, is_resumed: bool, stop: StopFlag, data: RunData) -> Run:
    """The run with its model on its device, once its inputs are those that it was begun with; begins its folder."""
    pinned = pins.make(config, data.content, data.from_scratch)
    pins.require_like_siblings(folder, pinned, config)
    if is_resumed:
        pins.require_resumable(folder, pinned, config)

    machine = machines.find_machine(config, data.lengths)
    print(f"machine: {machine}")
    loaded = policy.new_model(config, machine) if data.from_scratch else policy.load(config, machine)

    if machine.ranks.is_main:
        if not is_resumed:
            write_command(folder, given_overrides.get())
        write_config(config, folder)  # last: with it the folder is a run that can be resumed
    stop_if_asked(folder, stop, machine.ranks)
    return Run(config, folder, is_resumed, stop, data, pinned, loaded)


def fill_reference(run: Run) -> tuple[Run, ReferenceStore | None]:
    """The store with the reference's values of all draws that the run will make; None if the loss needs no reference.
    And the run, whose rows know their surprising tokens if masks favour these.

    The windows are the optimizer steps: packed as training packs them, so that a value has the same bits.
    """
    config, pairs = run.config, run.data.items
    settings = loop_settings(config, len(pairs), best_metric=None)
    if not config.dry_run:
        warmup_note(config.optim, settings)
    if not LOSSES[config.dpo.loss].needs_reference:
        print(f"reference: none. dpo.loss={config.dpo.loss} compares with none; rewards are beta times the ELBO.")
        return run, None

    estimator = reference_values.reference_estimator(config.dpo, config.seed, run.loaded.block_length)
    reference = reference_of(run)
    steps = (settings.total_steps, len(pairs), settings.items_per_step, config.dpo.mask_rounds)
    visited = reference_values.visited_windows(config.seed, *steps)
    rows = surprise_sets.complete(reference, estimator, (pairs, run.data.mismatched), visited, run.stop)
    store = reference.store(estimator)
    reference.complete_training(store, estimator, rows, visited, run.stop)
    data = dataclasses.replace(run.data, items=rows[0], mismatched=rows[1])
    return dataclasses.replace(run, data=data), store


def reference_of(run: Run) -> Reference:
    """The reference's values of the run's pairs."""
    config = run.config
    return Reference(config.paths.data_dir, config.auto, config.quantization, run.data.prepared, run.loaded)


def build_task(run: Run, store: ReferenceStore | None) -> Training:
    """The loss on the run's pairs against the stored reference, with what its loop takes."""
    config, machine, pairs = run.config, run.machine, run.data.items
    objective = reference_values.objective_of(config.dpo)
    validation = validation_of_pairs(run, objective)
    parameters = policy.make_trainable(config, run.loaded)
    optimizer = optimizer_of(config, parameters)

    backward = machine.choice.setup.backward
    print(f"gradient: {backward} ({machine.choice.reason})")
    estimator = reference_values.training_estimator(config.dpo, config.seed, run.loaded.block_length)
    parts = (run.loaded.denoiser, parameters, pairs, store, estimator, objective, machine.token_budget, backward)
    is_paired = LOSSES[config.dpo.loss].takes_pairs
    task = DpoTask(*parts, run.ranks) if is_paired else CompletionTask(*parts, run.ranks, run.data.mismatched)

    method, unit = ("pairs" if store is None else "DPO", "pairs") if is_paired else ("completions", "rows")
    settings = loop_settings(config, len(pairs), validation.best_metric)
    steps = f"{settings.total_steps} steps of {min(settings.items_per_step, len(pairs))} {unit} from {len(pairs)}"
    loss = f"loss {config.dpo.loss}, beta {config.dpo.beta:g}, draws {config.dpo.diffusion_samples}"
    print(f"{method}: {steps}, {loss}")
    step_tokens = settings.items_per_step * run.data.lengths.longest_pair
    memory = StepMemory(machine, run.loaded.model, optimizer, step_tokens)
    return Training(task, parameters, optimizer, settings, validation, unit, watch=memory.watch)


def loop_settings(
    config: RunConfig,
    item_count: int,
    best_metric: str | None,
    *,
    has_pairs: bool = True,
    from_scratch: bool = False,
) -> LoopSettings:
    """The loop's settings for a run over `item_count` rows: pairs, which have a chosen side to watch, or SFT rows."""
    optim, stopping = config.optim, config.stopping
    has_reference = has_pairs and LOSSES[config.dpo.loss].needs_reference
    is_watched = config.evaluation.every_steps is not None and config.best_metric != "none"
    return LoopSettings(
        seed=config.seed,
        total_steps=min(total_steps(optim, config.hardware, item_count), 2 if config.dry_run else sys.maxsize),
        items_per_step=pairs_per_step(config.optim, config.hardware),
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.lr_scheduler_type,
        num_warmup_steps=optim.num_warmup_steps,
        max_grad_norm=optim.max_grad_norm or 0.0,
        save_steps=config.save_steps or 0,
        save_minutes=config.save_minutes or 0.0,
        save_total_limit=config.save_total_limit or 0,
        logging_steps=config.logging_steps,
        eval_steps=config.evaluation.every_steps or 0,
        eval_at_start=not from_scratch,  # random weights answer nothing, and at full length
        best_metric=best_metric,
        higher_is_better=best_metric != LOSS,
        patience=(stopping.patience or 0) if is_watched else 0,
        max_chosen_fall=(stopping.max_chosen_fall or 0.0) if has_reference else 0.0,
        skip_nonfinite=optim.skip_nonfinite,
    )


def validation_of_pairs(run: Run, objective: DpoObjective | CompletionObjective) -> Validation:
    """Validation on the held-out pairs or completions, with their reference values if the loss needs them."""
    config, prepared = run.config, run.data.prepared
    pairs = list(prepared.validation)[: config.evaluation.num_pairs]
    estimator = evaluation_estimator(config.evaluation.diffusion_samples, config.seed, run.loaded.block_length)
    if objective.needs_reference:
        items = reference_of(run).items(pairs, estimator, run.stop, f"validation {prepared.noun}")
    else:
        items = [pair_item(pair, estimator, estimator.draw_indices(0)) for pair in pairs]
    prompts = list({pair.group: pair.prompt_ids for pair in pairs}.values())
    return validation_of(run, prompts, items=items, block=estimator.block, objective=objective)


def validation_of(run: Run, prompts: Sequence[np.ndarray] = (), **measured: Any) -> Validation:
    """Validation by the run's settings. `measured`: fields of Validation."""
    config = run.config
    groups = (config.evaluation, config.data, config.quantization)
    settings = (*groups, config.seed, config.paths.data_dir, config.best_metric)
    return open_validation(run.loaded, *settings, run.stop, prompts, **measured)


def optimizer_of(config: RunConfig, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimizer of the run over these weights."""
    optim = config.optim
    return build_optimizer(optim.optimizer, parameters, tuple(optim.betas), optim.eps, optim.weight_decay)


def check_step_zero(run: Run, training: Training) -> None:
    """A new run stops here where policy and reference differ before the first step."""
    stop_if_asked(run.folder, run.stop, run.ranks)
    if training.task.store is None:
        print("step 0: not checked, since there is no reference to compare with")
    elif not run.is_resumed or resume_step(run.folder) == 0:
        held_out = None if run.config.dpo.common_random_numbers else training.validation.items
        step_zero_check(training.task, training.settings, run.machine.precision, held_out)


def trackers_of(run: Run) -> Trackers:
    """The trackers of the run, open until its results are logged."""
    at_step = resume_step(run.folder) if run.is_resumed else None
    return open_trackers(run.config.logger, run.folder, dataclasses.asdict(run.config), at_step, run.ranks)


def run_loop(run: Run, training: Training, trackers: Trackers, of_weights: Mapping[str, object] | None = None) -> Ended:
    """All steps of the run. `of_weights` is written to the manifests of its weights."""
    config, folder, ranks, validation = run.config, run.folder, run.ranks, training.validation
    at_step = resume_step(folder) if run.is_resumed else None
    fields = {"pins": dict(run.pins), **(of_weights or {})}
    with fault_reports(folder, training.parameters, config.seed, ranks):
        kept = (config.adapter, config.model, folder, run.loaded)
        objective = validation.objective  # beta is that of rewards against a reference, which sft has not
        beta = objective.beta if objective and objective.needs_reference else None
        watch = watch_of(folder, beta, at_step)
        more = {"template": given_template(config.data).source, "keeps_weights": not config.dry_run}
        outputs = run_outputs(*kept, trackers, watch, validation, fields, **more)
        state = train_loop(
            training.task,
            training.parameters,
            training.optimizer,
            training.settings,
            outputs,
            validation.measure if validation.is_wanted else None,
            run.stop,
            resume=run.is_resumed,
            scaler=gradient_scaler(run.machine),
            unit=training.unit,
            watch=training.watch,
            ranks=ranks,
        )
    return Ended(state, outputs)


def plot_run(run: Run, training: Training, ended: Ended, title: str) -> None:
    """plots/training.png from the logs."""
    if run.ranks.is_main:
        plots.training_plot(
            ended.outputs.metrics.read(),
            run.folder / "plots" / "training.png",
            timing=ended.outputs.timing.read(),
            title=title,
            best_step=ended.state.best_step if training.settings.best_metric else None,
        )


def finish(run: Run, training: Training, ended: Ended, trackers: Trackers) -> list[str]:
    """Plot the run and evaluate base against tuned; how the run ended, in lines for people."""
    config, state, settings = run.config, ended.state, training.settings
    title = f"{config.model.name}, {config.data.source}: beta {config.dpo.beta:g}, n {config.dpo.diffusion_samples}"
    plot_run(run, training, ended, title)

    said: list[str] = []
    if state.stopped_early:
        said.append(f"stopped early at step {state.step}: {state.stopped_early}")
    if settings.best_metric and state.best_value is not None and math.isfinite(state.best_value):
        said.append(f"kept step {state.best_step}: {settings.best_metric} = {state.best_value:.4g}")
        if state.best_step == 0:
            said.append("no evaluation beat step 0: the weights before training are kept, the last ones beside them")
    if config.evaluation.at_end:
        evaluate_at_end(run, trackers, said.append)
    return [*said, f"adapter, metrics, checkpoints and plots: {run.folder}"]


def evaluate_at_end(run: Run, trackers: Trackers, say: Callable[[str], None]) -> None:
    """evaluation/ of the run: base against tuned on its test tasks and held-out rows."""
    tuned, place = tuned_weights(run.config.adapter, run.folder), run.folder / "evaluation"
    asked = (run.data.prepared, run.loaded, run.stop, run.data.tasks, say)
    results = base_and_tuned.evaluate_run(run.config, tuned, place, *asked)
    log_results(trackers, results, resume_step(run.folder))


def seal(run: Run, kind: str, fields: Mapping[str, Any]) -> None:
    """The run's manifest: from here on it is finished. Rank 0 writes it, once the weights are found whole."""
    if not run.ranks.is_main:
        return
    check_weights(run.config.adapter, run.folder)
    data = run.data.prepared.manifest["fingerprint"] if run.data.prepared else "corpus"
    content = {**fields, "data": data, "start": run.loaded.weights, "pins": run.pins}
    manifests.write_manifest(run.folder, kind, content, manifests.present(run.folder, SEALED), **manifests.provenance())


def stop_if_asked(folder: Path, stop: StopFlag, ranks: Ranks) -> None:
    """Between two parts of a run that cannot be stopped inside: a signal that came in the first keeps the second from
    starting."""
    if ranks.agree_to_stop(stop):
        raise Stopped(f"{folder}: stopped by {stop.name}; no step was under way.", "Give the command again.")


def gradient_scaler(machine: Machine) -> torch.amp.GradScaler | None:
    """The loss scaler that float16 needs; None elsewhere."""
    return torch.amp.GradScaler(machine.device.type) if machine.precision == "fp16" else None
