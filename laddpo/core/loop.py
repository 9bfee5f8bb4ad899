"""The training loop: which items make step s, one exact gradient, one optimizer step, and what is kept of it.

The input is a task (DPO on pairs, SFT on rows). The output is metrics.jsonl, checkpoints, the best and the last
weights. Order, noise and learning rate are functions of (seed, step), so a run that is killed and resumed writes the
same bytes as one that was not (on one machine with the same libraries)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from laddpo.core.noise import step_items
from laddpo.core.optim import clip_gradients, learning_rate
from laddpo.errors import NonFiniteStep, Stopped, UserError
from laddpo.processes.progress import Progress
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.processes.signals import StopFlag
from laddpo.storage import checkpoint as checkpoints
from laddpo.storage.manifests import require_keys
from laddpo.storage.run_outputs import RunOutputs

RESUMED = ("optimizer", "loop.step", "metrics.bytes", "metrics.sha256")  # of a checkpoint's state
MAX_OVERFLOWS = 25  # in a row; from 65,536 the loss scale has then fallen below 0.002


class TrainingTask(Protocol):
    """What is trained on. `accumulate` adds the gradient of the items' mean loss and returns metrics, loss included.

    All ranks call it with the same items, and all get the same gradient and metrics.
    """

    item_count: int

    def accumulate(self, indices: Sequence[int], epoch: int, loss_scale: float) -> dict[str, float]: ...

    def names(self, indices: Sequence[int]) -> list[str]: ...


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, and what is kept. Steps are optimizer steps; `items_per_step` is the global batch."""

    seed: int
    total_steps: int
    items_per_step: int
    learning_rate: float
    lr_scheduler_type: str = "cosine"
    num_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    save_steps: int = 0
    save_minutes: float = 0.0
    save_total_limit: int = 2
    logging_steps: int = 1
    eval_steps: int = 0
    eval_at_start: bool = True
    best_metric: str | None = None
    higher_is_better: bool = True
    patience: int = 0
    max_chosen_fall: float = 0.0
    skip_nonfinite: int = 0


@dataclass
class LoopState:
    """All of a run that is not a function of (seed, step)."""

    step: int = 0
    unit: str = ""  # what the run is trained on: pairs or rows; "" where an older version saved it
    best_value: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    evaluated_step: int = -1
    evaluations_since_best: int = 0
    skipped: int = 0
    overflows: int = 0
    stopped_early: str = ""
    loss_scaler: dict[str, Any] = field(default_factory=dict)


def train_loop(
    task: TrainingTask,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    outputs: RunOutputs,
    validate: Callable[[int], dict[str, float]] | None,
    stop: StopFlag,
    resume: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    unit: str = "pairs",
    watch: Callable[[bool], AbstractContextManager[dict[str, float]]] | None = None,
    ranks: Ranks = ALONE,
) -> LoopState:
    """Train to `total_steps`, or to an early stop. `parameters` are the trainable tensors by name; `watch(is last
    step)` surrounds every step and gives more fields for its line in timing.jsonl. Several ranks run the same loop in
    step: what they could see differently (clocks, signals, rounding, files) is rank 0's word or any rank's.

    Raises `RunFault` before the optimizer step when the loss or gradient is not finite, and `Stopped` after a signal,
    with a checkpoint saved.
    """
    state = _resume(outputs, parameters, optimizer, settings, scaler, ranks, unit) if resume else _start(outputs)
    state.unit = unit
    outputs.timing.rewind(lambda record: record["step"] <= state.step if state.step else False)

    save = partial(_save, outputs, parameters, optimizer, settings, state, scaler)
    last_save, saved = time.monotonic(), (state.step, state.evaluated_step)
    _evaluate_if_due(validate, settings, outputs, state, ranks)

    bar = {"unit": "step", "desc": "train", "dynamic_ncols": True, "disable": not ranks.is_main}
    with Progress(total=settings.total_steps, initial=state.step, **bar) as progress:
        while state.step < settings.total_steps and not state.stopped_early:
            started = time.perf_counter()
            is_last = state.step + 1 == settings.total_steps
            with watch(is_last) if watch else nullcontext({}) as memory:
                metrics = _step(task, parameters, optimizer, settings, state, scaler, ranks)
            state.step += 1
            _log_step(outputs, settings, state, metrics, memory, time.perf_counter() - started, unit, progress)

            try:
                _evaluate_if_due(validate, settings, outputs, state, ranks)
            except Stopped:  # evaluated again when the run is resumed
                save()
                raise _stopped(outputs, settings, state, stop) from None

            is_due = settings.save_steps and state.step % settings.save_steps == 0
            is_overdue = ranks.broadcast(
                settings.save_minutes > 0 and time.monotonic() - last_save > 60 * settings.save_minutes
            )
            is_stopping = ranks.agree_to_stop(stop)
            if is_due or is_overdue or is_stopping:
                save()
                last_save, saved = time.monotonic(), (state.step, state.evaluated_step)
            if is_stopping and state.step < settings.total_steps:
                raise _stopped(outputs, settings, state, stop)

    if saved != (state.step, state.evaluated_step):  # a stop during the last evaluation saved the step without it
        save()
    _keep_ends(outputs, settings, state)
    return state


def _evaluate_if_due(
    validate: Callable[[int], dict[str, float]] | None,
    settings: LoopSettings,
    outputs: RunOutputs,
    state: LoopState,
    ranks: Ranks,
) -> None:
    if state.step == 0:
        is_due = settings.eval_at_start
    else:
        is_last = state.step == settings.total_steps
        is_due = is_last or (settings.eval_steps and state.step % settings.eval_steps == 0)
    if validate and is_due and state.evaluated_step != state.step:
        _evaluate(validate, settings, outputs, state, ranks)


def _keep_ends(outputs: RunOutputs, settings: LoopSettings, state: LoopState) -> None:
    """The last weights, and the best ones where no evaluation chose any."""
    if outputs.writes:  # a crash may have come between the last save and this
        checkpoints.remove_older(outputs.checkpoints, settings.save_total_limit)
    outputs.save_last(state.step)
    if state.best_value is None:  # nothing was validated, or never with a finite value
        state.best_step = state.step
        outputs.save_best(state.step)


def _stopped(outputs: RunOutputs, settings: LoopSettings, state: LoopState, stop: StopFlag) -> Stopped:
    where = f"after step {state.step} of {settings.total_steps}, checkpoint saved."
    return Stopped(f"{outputs.folder}: stopped by {stop.name} {where}", f"Continue with resume={outputs.folder}.")


def _step(
    task: TrainingTask,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    state: LoopState,
    scaler: torch.amp.GradScaler | None,
    ranks: Ranks,
) -> dict[str, float]:
    """One optimizer step; its metrics. The step is not applied when loss or gradient is not finite."""
    epoch, indices = step_items(settings.seed, state.step, task.item_count, settings.items_per_step)
    rate = learning_rate(
        settings.lr_scheduler_type, state.step, settings.learning_rate, settings.num_warmup_steps, settings.total_steps
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    metrics = task.accumulate(indices, epoch, _loss_scale(scaler, parameters) if scaler else 1.0)
    if all(parameter.grad is None for parameter in parameters.values()):
        scaler = None  # no draw masked anything: there is no gradient, without which a scaler refuses to step
    if scaler:
        scaler.unscale_(optimizer)
    # without max_grad_norm the norm is still measured: infinity clips nothing
    norm = ranks.broadcast(clip_gradients(list(parameters.values()), settings.max_grad_norm or math.inf))
    if scaler:
        # overflow is how the scaler finds its scale: it skips this step itself and halves the scale
        scaler.step(optimizer)
        scaler.update()
        is_finite = math.isfinite(metrics["loss"])
        _count_overflows(task, indices, norm, metrics["loss"], scaler, state)
    else:
        is_finite = math.isfinite(norm) and math.isfinite(metrics["loss"])
        if is_finite:
            optimizer.step()
    if not is_finite:
        _count_nonfinite(task, indices, norm, metrics["loss"], settings, state)
    return _loggable({**metrics, "learning_rate": rate, "grad_norm": norm, "epoch": epoch})


def _loss_scale(scaler: torch.amp.GradScaler, parameters: Mapping[str, Tensor]) -> float:
    """The scaler's factor, by its `scale`: until that is called once, a GradScaler has no state to unscale with."""
    return float(scaler.scale(torch.ones((), device=next(iter(parameters.values())).device)))


def _loggable(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: without NaN and infinity."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _count_nonfinite(
    task: TrainingTask, indices: Sequence[int], norm: float, loss: float, settings: LoopSettings, state: LoopState
) -> None:
    state.skipped += 1
    if state.skipped > settings.skip_nonfinite:
        names = task.names(indices)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise NonFiniteStep(
            f"step {state.step + 1}: the loss is {loss} and the gradient norm {norm}, expected finite numbers. "
            f"The weights are as before this step. Rows: {shown}. Lower optim.learning_rate, use "
            f"hardware.precision=fp32, or skip up to k such steps with optim.skip_nonfinite=k.",
            _fault_facts(names, norm, loss, state),
        )


def _count_overflows(
    task: TrainingTask, indices: Sequence[int], norm: float, loss: float, scaler: torch.amp.GradScaler, state: LoopState
) -> None:
    """A scaler skips a step that overflows, and the next, and the next: where no scale helps, the run stops."""
    state.overflows = 0 if math.isfinite(norm) else state.overflows + 1
    if state.overflows >= MAX_OVERFLOWS:
        names = task.names(indices)
        raise NonFiniteStep(
            f"step {state.step + 1}: the float16 gradient overflowed in {state.overflows} steps one after the other, "
            f"and the loss scale fell to {scaler.get_scale():g}; expected that a lower scale helps. The weights are as "
            f"before these steps. Rows of the last: {', '.join(names[:8])}. Use hardware.precision=bf16 or fp32, or "
            "lower optim.learning_rate.",
            _fault_facts(names, norm, loss, state),
        )


def _fault_facts(names: list[str], norm: float, loss: float, state: LoopState) -> dict[str, Any]:
    return {"step": state.step + 1, "rows": names, "loss": str(loss), "grad_norm": str(norm)}


def _log_step(
    outputs: RunOutputs,
    settings: LoopSettings,
    state: LoopState,
    metrics: dict[str, float],
    memory: dict[str, float],
    seconds: float,
    unit: str,
    progress: Progress,
) -> None:
    tokens, items = metrics.pop("tokens"), metrics.pop("items")
    shown = {"loss": metrics["loss"], "acc": metrics.get("rewards/accuracies"), f"{unit}/s": items / seconds}
    progress.set_postfix({name: f"{value:.3g}" for name, value in shown.items() if value is not None}, refresh=False)
    progress.update()
    if state.step % settings.logging_steps and state.step != settings.total_steps:
        return
    outputs.metrics.append({"step": state.step, **metrics})
    speed = {f"speed/{unit}_per_s": items / seconds, "speed/tokens_per_s": tokens / seconds, "seconds": seconds}
    outputs.timing.append({"step": state.step, **speed, **memory})
    outputs.track({**metrics, **speed, **memory}, state.step)


def _evaluate(
    validate: Callable[[int], dict[str, float]],
    settings: LoopSettings,
    outputs: RunOutputs,
    state: LoopState,
    ranks: Ranks,
) -> None:
    """Validate, keep the best weights, and decide on an early stop."""
    started = time.perf_counter()
    metrics = ranks.broadcast(validate(state.step))
    outputs.timing.append({"step": state.step, "evaluation_seconds": time.perf_counter() - started})
    if settings.best_metric:
        if settings.best_metric not in metrics:
            raise UserError(
                f"best_metric is {settings.best_metric!r}, which this run's validation does not measure; known: "
                f"{', '.join(sorted(metrics))}. Fix the name, or set best_metric=auto."
            )
        value = metrics[settings.best_metric]
        sign = 1 if settings.higher_is_better else -1
        loss = _loggable(metrics).get("validation/loss")  # decides where the metric ties
        is_tie = value == state.best_value  # may keep better weights, but patience counts it as no improvement
        is_better = math.isfinite(value) and _is_better(sign * value, loss, state, sign)
        if is_better:
            state.best_value, state.best_loss, state.best_step = value, loss, state.step
            outputs.save_best(state.step)
        state.evaluations_since_best = 0 if is_better and not is_tie else state.evaluations_since_best + 1
        if settings.patience and state.evaluations_since_best >= settings.patience:
            state.stopped_early = f"{settings.best_metric} has not improved for {settings.patience} evaluations"
    state.evaluated_step = state.step
    fall = metrics.get("validation/chosen_fall", 0.0)
    if settings.max_chosen_fall and fall > settings.max_chosen_fall:
        state.stopped_early = (
            f"the log-likelihood of the chosen responses fell by {fall:.0%} of the reference's "
            f"(stopping.max_chosen_fall={settings.max_chosen_fall:g})"
        )
    outputs.metrics.append({"step": state.step, **_loggable(metrics)})
    outputs.track(_loggable(metrics), state.step)


def _is_better(value: float, loss: float | None, state: LoopState, sign: int) -> bool:
    """Whether `value` (higher is better) beats the best one so far, or equals it at a lower validation loss."""
    if state.best_value is None or value != sign * state.best_value:
        return state.best_value is None or value > sign * state.best_value
    return loss is not None and state.best_loss is not None and loss < state.best_loss


def _save(
    outputs: RunOutputs,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    state: LoopState,
    scaler: torch.amp.GradScaler | None,
) -> None:
    if scaler:
        state.loss_scaler = scaler.state_dict()
    checkpoints.save_checkpoint(
        outputs.checkpoints,
        state.step,
        parameters,
        optimizer,
        {"loop": vars(state), "metrics": outputs.metrics.seal(), "pins": dict(outputs.pins)},
        settings.save_total_limit,
        outputs.writes,
    )


def _start(outputs: RunOutputs) -> LoopState:
    outputs.metrics.rewind(lambda record: False)
    return LoopState()


def _resume(
    outputs: RunOutputs,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    scaler: torch.amp.GradScaler | None,
    ranks: Ranks,
    unit: str,
) -> LoopState:
    """The state of the newest good checkpoint, or a fresh one when the run died before its first."""
    newest = checkpoints.newest_of_main(outputs.checkpoints, ranks)
    if newest is None:
        print(f"{outputs.folder}: no checkpoint yet; starting at step 0.")
        return _start(outputs)
    path, cure = newest.folder / checkpoints.STATE, "Finish the run with that version, or start a new one."
    require_keys(path, newest.state, RESUMED, cure)
    if unknown := newest.state["loop"].keys() - vars(LoopState()).keys():
        raise UserError(
            f"{path}: has {', '.join(sorted(unknown))} in loop, expected what this version knows; a newer version of "
            f"laddpo wrote it. {cure}"
        )
    if (saved := newest.state["loop"].get("unit")) and saved != unit:
        raise UserError(
            f"{newest.folder}: is of a run on {saved}, expected one on {unit}. Continue it by the stage "
            "that began it (train: pairs; sft: rows), or choose another folder."
        )
    if (step := newest.state["loop"]["step"]) > settings.total_steps:
        raise UserError(
            f"{outputs.folder}: its checkpoint is at step {step}, and this run would end at {settings.total_steps}. "
            f"Set optim.max_train_steps to {step} or more, or start a new run."
        )
    checkpoints.restore(newest, parameters, optimizer)
    state = LoopState(**newest.state["loop"])
    outputs.metrics.cut(newest.state["metrics"])
    if scaler and state.loss_scaler:
        scaler.load_state_dict(state.loss_scaler)
    print(f"{outputs.folder}: resuming at step {state.step} ({newest.folder.name}).")
    return state
