"""What DPO and SFT runs share around the loop: its settings, its outputs, validation, and the check at step 0."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from laddpo.core.loop import LoopSettings
from laddpo.errors import Stopped, UserError
from laddpo.hardware.machine import Machine
from laddpo.hardware.planning import pairs_per_step
from laddpo.inputs import policy
from laddpo.inputs.policy import Loaded
from laddpo.inputs.tuned import what_is_left
from laddpo.models import adapters, loading
from laddpo.processes.ranks import Ranks, here, whole
from laddpo.processes.signals import StopFlag
from laddpo.settings.schema import RunConfig, keywords
from laddpo.storage import atomic, manifests
from laddpo.storage.checkpoint import step_folders, step_of
from laddpo.storage.run_outputs import RunOutputs
from laddpo.training.tracking import Trackers
from laddpo.training.validation import LOSS, Validation

SEALED = (  # of a finished run
    *("config.yaml", "metrics.jsonl"),
    *("evaluation/results.json", "evaluation/items.jsonl", "evaluation/pairs.jsonl"),
)


def total_steps(config: RunConfig, item_count: int) -> int:
    """Optimizer steps of a run over `item_count` rows."""
    optim = config.optim
    if optim.max_train_steps is not None:
        return optim.max_train_steps
    return math.ceil(optim.num_train_epochs * math.ceil(item_count / pairs_per_step(config)))


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
    is_watched = config.evaluation.every_steps is not None and config.best_metric != "none"
    return LoopSettings(
        seed=config.seed,
        total_steps=min(total_steps(config, item_count), 2 if config.dry_run else sys.maxsize),
        items_per_step=pairs_per_step(config),
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
        max_chosen_fall=(stopping.max_chosen_fall or 0.0) if has_pairs else 0.0,
        skip_nonfinite=optim.skip_nonfinite,
    )


def warmup_note(config: RunConfig, settings: LoopSettings) -> None:
    """Say that the run ends within its warm-up. How many steps its epochs are is known only once the rows are counted;
    laddpo/settings/checks.py says it of a given number of steps."""
    from_epochs = config.optim.max_train_steps is None and not config.dry_run
    if from_epochs and settings.total_steps < settings.num_warmup_steps and here().is_main:
        print(
            f"note: optim.num_train_epochs={config.optim.num_train_epochs:g} are {settings.total_steps} steps on these "
            f"rows, which end within the warm-up of optim.num_warmup_steps={settings.num_warmup_steps}: the learning "
            "rate never reaches its value. Lower optim.num_warmup_steps, or train longer.",
            file=sys.stderr,
        )


def dry_run_settings(config: RunConfig) -> RunConfig:
    """The same run without validation, evaluation and trackers: what remains is two steps."""
    evaluation = dataclasses.replace(config.evaluation, at_end=False, num_pairs=0, tasks=[], every_steps=None)
    logger = dataclasses.replace(config.logger, tensorboard=False, wandb=False)
    return dataclasses.replace(config, evaluation=evaluation, logger=logger, best_metric="none")


def longest_pairs(pairs, count: int) -> list:
    """The `count` pairs with the most tokens: the batch that needs the most memory."""
    lengths = pairs.lengths()
    tokens = 2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]
    return [pairs[int(i)] for i in np.argsort(-tokens, kind="stable")[:count]]


@contextlib.contextmanager
def run_outputs(
    config: RunConfig,
    folder: Path,
    loaded: Loaded,
    resume_step: int | None,
    validation: Validation | None = None,
    pins: Mapping[str, Any] | None = None,
    more_fields: Mapping[str, object] = MappingProxyType({}),
) -> Iterator[RunOutputs]:
    """Where the loop writes: weights, metrics, sample answers, and the trackers, closed at the end. `more_fields` go
    into the manifest of the weights."""
    is_full = config.adapter.kind == "full"
    best, last = (policy.MODEL, policy.MODEL_LAST) if is_full else (policy.ADAPTER, policy.ADAPTER_LAST)

    ranks = loaded.machine.ranks

    def save(name: str, step: int) -> None:
        if config.dry_run:
            return
        state = None
        if loaded.machine.is_sharded:  # every rank gives its part
            state = whole(loaded.model.state_dict() if is_full else adapters.adapter_state(loaded.model), ranks.is_main)
        if not ranks.is_main:
            return
        with atomic.replaced_folder(folder / name) as target:
            if is_full:
                files = loading.save_model(loaded.model, target, state=state)
                files += loading.copy_tokenizer(policy.model_path(config), config.model.revision, target)
            else:
                files = adapters.save_adapter(loaded.model, target, state)
            fields = {"step": step, "base": loaded.weights, "pins": dict(pins or {}), **more_fields}
            manifests.write_manifest(target, "weights", fields, files, **manifests.provenance())

    logger = config.logger
    settings = keywords(logger) if logger.wandb else {"tensorboard": logger.tensorboard}
    if not ranks.is_main:
        settings = {}
    with Trackers(folder, settings, dataclasses.asdict(config), resume_step=resume_step) as trackers:

        def show(step: int, text: str) -> None:
            if not ranks.is_main:
                return
            atomic.write_text(folder / "samples" / f"step_{step:07d}.txt", text + "\n")
            trackers.text(step, "samples", text)

        if validation is not None:
            validation.show = show
        yield RunOutputs(
            folder,
            save_best=lambda step: save(best, step),
            save_last=lambda step: save(last, step),
            track=lambda metrics, step: trackers.scalars(step, metrics),
            writes=ranks.is_main,
            pins=pins or {},
        )


def check_weights(config: RunConfig, folder: Path) -> None:
    """Before a run is sealed: the weights that it kept are whole. A run that was resumed kept some of them long ago."""
    names = (
        (policy.MODEL, policy.MODEL_LAST) if config.adapter.kind == "full" else (policy.ADAPTER, policy.ADAPTER_LAST)
    )
    for name in names:
        if manifests.read_manifest(folder / name, "weights") is None:
            raise UserError(
                f"{folder / name}: is gone; expected the weights that the run kept. "
                f"{what_is_left(folder, folder / names[0])}"
            )


def resume_step(folder: Path) -> int:
    """The step that a resumed run goes on from, for the trackers: the newest checkpoint's by its name."""
    newest = step_folders(folder / "checkpoints")[:1]
    return step_of(newest[0]) if newest else 0


def stop_if_asked(folder: Path, stop: StopFlag, ranks: Ranks) -> None:
    """Between two parts of a run that cannot be stopped inside: a signal that came in the first keeps the second from
    starting."""
    if ranks.agree_to_stop(stop):
        raise Stopped(f"{folder}: stopped by {stop.name}; no step was under way.", "Give the command again.")


def gradient_scaler(machine: Machine) -> torch.amp.GradScaler | None:
    """The loss scaler that float16 needs; None elsewhere."""
    return torch.amp.GradScaler(machine.device.type) if machine.precision == "fp16" else None
