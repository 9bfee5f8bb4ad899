"""DPO on preference pairs: rows, reference and base model in; adapter, metrics, plots and an evaluation out.

    python -m laddpo.train                                      embedded task and model, minutes on a CPU
    python -m laddpo.train model=llada_8b hardware=rtx4080      the real job
    python -m laddpo.train -m dpo.beta=0.5,1,2                  a sweep on one reference store
    python -m laddpo.train data=onpolicy rounds=3               on the model's own answers, three times over

Prepared pairs and reference log-likelihoods are made first when they are not there yet (auto=true).
"""

from __future__ import annotations

import math
from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.settings.read_settings import given_overrides
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Train one run in `run_folder`, or in the run that `resume` names."""
    from laddpo.training.resuming import check_finished, find_run, held, step_processes, told_to_resume

    place = find_run(config, run_folder)
    if place.is_finished:
        check_finished(config, place.folder, "train")
        print(place.folder)
        return
    from laddpo.processes.signals import stop_on_signal

    if config.dry_run:
        dry_run(step_processes(config, place), place.folder)
        return
    with held(place.folder, "train", place.is_resumed), told_to_resume(place.folder), stop_on_signal() as stop:
        config = step_processes(config, place)
        if config.data.rounds > 1:
            from laddpo.training.rounds import train_rounds

            train_rounds(config, place.folder, train, stop)
        else:
            train(config, place.folder, place.is_resumed, stop)
    print(place.folder)


def dry_run(config: RunConfig, folder: Path) -> None:
    """Two steps on the longest batch, in a folder below `folder` that is taken for no run and goes when they are done.

    Of several rounds it is the first. What a step that is not finite left for a report stays.
    """
    import contextlib
    import shutil

    from laddpo.errors import Stopped
    from laddpo.processes.ranks import here
    from laddpo.processes.signals import stop_on_signal
    from laddpo.training.resuming import held
    from laddpo.training.rounds import config_of_round

    place = folder / "dry_run"
    try:
        with held(place, "dry_run"), stop_on_signal() as stop:
            try:
                train(config_of_round(config, 1, config.adapter.path, place), place, False, stop)
            finally:
                if here().is_main and not (place / "fault").exists():
                    shutil.rmtree(place, ignore_errors=True)
    except Stopped:
        raise Stopped(
            "the dry run was stopped by a signal; nothing of it is kept.", "Give the command again."
        ) from None
    finally:
        if here().is_main:
            with contextlib.suppress(OSError):  # the user's own folder, with something in it
                folder.rmdir()


def train(config: RunConfig, folder: Path, is_resumed: bool, stop) -> None:
    """Everything between the settings and the finished run folder."""
    from laddpo.core.loop import train_loop
    from laddpo.core.optim import build_optimizer
    from laddpo.core.tasks import DpoTask
    from laddpo.evaluation.base_and_tuned import open_tasks
    from laddpo.hardware.footprint import StepMemory, dry_run_text, retries_text
    from laddpo.hardware.machine import find_machine
    from laddpo.hardware.planning import pairs_per_step
    from laddpo.inputs import pins, policy, reference_values
    from laddpo.inputs.data import data_lengths
    from laddpo.inputs.reference_values import visited_windows
    from laddpo.settings.compose import write_config
    from laddpo.settings.of_a_run import write_command
    from laddpo.storage import manifests
    from laddpo.training.faults import fault_reports, step_zero_check
    from laddpo.training.pairs import check_enough, open_prepared
    from laddpo.training.run import (
        SEALED,
        check_weights,
        dry_run_settings,
        gradient_scaler,
        longest_pairs,
        loop_settings,
        resume_step,
        run_outputs,
        stop_if_asked,
        warmup_note,
    )
    from laddpo.training.validation import open_validation

    policy.check_before_loading(config, hash_again=True)
    test_tasks = open_tasks(config) if config.evaluation.at_end and not config.dry_run else []
    prepared = open_prepared(config)
    check_enough(config, prepared)
    pinned = pins.make(config, prepared.content)
    pins.require_like_siblings(folder, pinned, config)
    if is_resumed:
        pins.require_resumable(folder, pinned, config)
    lengths = data_lengths(config, prepared)
    machine = find_machine(config, lengths)
    print(f"machine: {machine}")
    loaded = policy.load(config, machine)
    ranks = machine.ranks
    if ranks.is_main:
        write_config(config, folder)
        if not is_resumed:
            write_command(folder, given_overrides.get())
    stop_if_asked(folder, stop, ranks)

    pairs = prepared.train
    if config.dry_run:
        config, pairs = dry_run_settings(config), longest_pairs(pairs, pairs_per_step(config))
    settings = loop_settings(config, len(pairs), best_metric=None)
    warmup_note(config, settings)
    estimator, reference_estimator = (
        reference_values.training_estimator(config),
        reference_values.reference_estimator(config),
    )
    store = reference_values.reference_store(config, prepared, loaded, reference_estimator)
    windows = [
        ([pairs[i] for i in indices], reference_estimator.draw_indices(epoch))
        for epoch, indices in visited_windows(
            config.seed, settings.total_steps, len(pairs), settings.items_per_step, config.dpo.mask_rounds
        )
    ]
    reference_values.complete_reference(config, loaded, store, reference_estimator, windows, stop, "training pairs")
    validation = open_validation(config, prepared, loaded, stop)

    parameters = policy.make_trainable(config, loaded)
    optim = config.optim
    optimizer = build_optimizer(optim.optimizer, parameters, tuple(optim.betas), optim.eps, optim.weight_decay)
    objective = reference_values.objective_of(config)
    backward = machine.choice.setup.backward
    print(f"backward: {backward} ({machine.choice.reason})")
    task = DpoTask(
        loaded.denoiser, parameters, pairs, store, estimator, objective, machine.token_budget, backward, ranks
    )
    settings = loop_settings(config, len(pairs), validation.best_metric)
    steps = f"{settings.total_steps} steps of {min(settings.items_per_step, len(pairs))} pairs from {len(pairs)}"
    print(f"DPO: {steps}, loss {config.dpo.loss}, beta {config.dpo.beta:g}, n {config.dpo.diffusion_samples}")
    stop_if_asked(folder, stop, ranks)
    if not is_resumed:
        step_zero_check(config, task, settings, machine.precision)
    step_tokens = settings.items_per_step * lengths.longest_pair
    memory = StepMemory(machine, loaded.model, optimizer, step_tokens)
    at_step = resume_step(folder) if is_resumed else None
    with (
        run_outputs(config, folder, loaded, at_step, validation, pinned) as outputs,
        fault_reports(folder, parameters, config.seed, ranks),
    ):
        state = train_loop(
            task,
            parameters,
            optimizer,
            settings,
            outputs,
            validation.measure if validation.is_wanted else None,
            stop,
            resume=is_resumed,
            scaler=gradient_scaler(machine),
            watch=memory.watch,
            ranks=ranks,
        )
    if machine.token_budget.retries:
        print(retries_text(machine))
    if config.dry_run:
        if ranks.is_main:
            speed = outputs.timing.read()[-1]["speed/tokens_per_s"]
            print(dry_run_text(config, lengths, len(prepared.train), speed))
        return
    shown: list[str] = []  # for people, once nothing of the run can be lost
    finish(config, folder, prepared, loaded, state, settings, stop, test_tasks, shown.append)
    if not ranks.is_main:
        return
    check_weights(config, folder)
    manifests.write_manifest(
        folder,
        "train",
        {
            "step": state.step,
            "best_step": state.best_step,
            "stopped_early": state.stopped_early,
            "data": prepared.manifest["fingerprint"],
            "start": loaded.weights,
            "pins": pinned,
        },
        manifests.present(folder, SEALED),
        **manifests.provenance(),
    )
    print("\n".join(shown))


def finish(config, folder: Path, prepared, loaded, state, settings, stop, test_tasks, say) -> None:
    """Plot the run, evaluate base against tuned on the tasks of open_tasks; `say` takes how the run ended."""
    from laddpo.evaluation.base_and_tuned import evaluate_run
    from laddpo.inputs.tuned import tuned_weights
    from laddpo.results.plots import training_plot
    from laddpo.storage.run_outputs import RunOutputs

    outputs = RunOutputs(folder, save_best=lambda step: None, save_last=lambda step: None)
    if loaded.machine.ranks.is_main:
        title = f"{config.model.name}, {config.data.source}: beta {config.dpo.beta:g}, n {config.dpo.diffusion_samples}"
        training_plot(
            outputs.metrics.read(),
            folder / "plots" / "training.png",
            timing=outputs.timing.read(),
            title=title,
            best_step=state.best_step if settings.best_metric else None,
        )
    if state.stopped_early:
        say(f"stopped early at step {state.step}: {state.stopped_early}")
    if settings.best_metric and state.best_value is not None and math.isfinite(state.best_value):
        say(f"kept step {state.best_step}: {settings.best_metric} = {state.best_value:.4g}")
        if state.best_step == 0:
            say("no evaluation beat the base model: what is kept is untrained; the last weights lie beside it")
    if config.evaluation.at_end:
        tuned, place = tuned_weights(config, folder), folder / "evaluation"
        evaluate_run(config, tuned, place, prepared, loaded, stop, test_tasks, say)
    say(f"adapter, metrics, checkpoints and plots: {folder}")


if __name__ == "__main__":
    run_stage("train", main)
