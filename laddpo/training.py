"""What DPO and SFT runs share around the loop: its settings, its outputs, validation, and the check at step 0."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laddpo.core.gradient import Item, lockstep
from laddpo.core.loop import LoopSettings, step_items
from laddpo.core.objectives import reference_draws
from laddpo.core.sharing import score_shared
from laddpo.core.tasks import DpoTask
from laddpo.errors import NonFiniteStep, RunFault, Stopped, UserError, visible
from laddpo.evaluation.answering import VALIDATION_LIMIT, answer_ids, answer_task, open_task
from laddpo.evaluation.heldout import row_losses
from laddpo.evaluation.tasks import HAS_VALIDATION_SPLIT, Task
from laddpo.hardware.machine import Machine
from laddpo.hardware.planning import pairs_per_step
from laddpo.inputs import policy, reference_values
from laddpo.inputs.margins import score_preferences
from laddpo.inputs.policy import Loaded
from laddpo.inputs.tuned import what_is_left
from laddpo.models import adapters, loading
from laddpo.preference.prepared import PreparedPairs
from laddpo.processes.ranks import Ranks, here, whole
from laddpo.processes.signals import StopFlag
from laddpo.settings.schema import RunConfig, keywords
from laddpo.storage import atomic, manifests
from laddpo.storage.checkpoint import save_tensors, step_folders, step_of
from laddpo.storage.run_outputs import RunOutputs
from laddpo.tracking import Trackers

SEALED = (  # of a finished run
    *("config.yaml", "metrics.jsonl"),
    *("evaluation/results.json", "evaluation/items.jsonl", "evaluation/pairs.jsonl"),
)
EXACT_MATCH, LOSS = "validation/exact_match", "validation/loss"
STEP_ZERO_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}  # relative, for another packing than the reference's
FAULT_BYTES = 2**30  # trainable weights up to this size go into a report of a fault


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


@contextlib.contextmanager
def fault_reports(folder: Path, parameters: Mapping[str, Tensor], seed: int, ranks: Ranks) -> Iterator[None]:
    """A step that is not finite leaves `fault/` in the run's folder: what, beside config.yaml, doing it again takes.

    The noise of the step follows from seed, step and row ids; the weights are stored where they are not huge. Of
    several ranks all come here, and the first one writes.
    """
    try:
        yield
    except NonFiniteStep as fault:
        size = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
        weights = whole(parameters, ranks.is_main) if size <= FAULT_BYTES else {}
        if ranks.is_main:
            _write_fault(folder / "fault", {**fault.facts, "seed": seed}, weights)
        message = f"{fault} What a bug report needs is in {folder / 'fault'}, beside {folder / 'config.yaml'}."
        raise NonFiniteStep(message, fault.facts) from fault


def _write_fault(folder: Path, facts: Mapping[str, object], weights: Mapping[str, Tensor]) -> None:
    broken = sorted(name for name, tensor in weights.items() if not bool(tensor.isfinite().all()))
    with atomic.replaced_folder(folder) as target:
        atomic.write_json(target / "fault.json", {**facts, "nonfinite_weights": broken})
        files = ["fault.json"]
        if weights:
            save_tensors(target / "weights.safetensors", weights)
            files.append("weights.safetensors")
        manifests.write_manifest(target, "fault", {}, files, **manifests.provenance())


def resume_step(folder: Path) -> int:
    """The step that a resumed run goes on from, for the trackers: the newest checkpoint's by its name."""
    newest = step_folders(folder / "checkpoints")[:1]
    return step_of(newest[0]) if newest else 0


@dataclass
class Validation:
    """Held-out pairs (DPO) or rows (SFT) and problems, measured during training. `show(step, text)` takes a few answers
    as they are now; where no task is answered they are made for `prompts`."""

    config: RunConfig
    loaded: Loaded
    items: Sequence[Item]
    block: int
    tasks: list[Task] = field(default_factory=list)
    stop: StopFlag | None = None
    prompts: list[np.ndarray] = field(default_factory=list)
    show: Callable[[int, str], None] = lambda step, text: None
    rows: Sequence[Item] = ()

    @property
    def is_wanted(self) -> bool:
        return bool(self.items or self.rows or self.tasks)

    @property
    def best_metric(self) -> str | None:
        """What chooses the checkpoint: exact match where the data has a grader, else the validation loss."""
        if self.config.best_metric != "auto":
            return None if self.config.best_metric == "none" else f"validation/{self.config.best_metric}"
        return EXACT_MATCH if self.tasks else LOSS if self.items or self.rows else None

    def measure(self, step: int) -> dict[str, float]:
        """Validation metrics of the model as it is now."""
        metrics: dict[str, float] = {}
        if self.items:
            objective = reference_values.objective_of(self.config)
            budget = self.loaded.machine.token_budget
            ranks = self.loaded.machine.ranks
            scored = (self.items, objective, self.block, budget, ranks, self.stop)
            scores = score_preferences(self.loaded.denoiser, *scored)
            metrics.update(scores.metrics())
        if self.rows:
            machine = self.loaded.machine
            losses = row_losses(self.loaded.denoiser, self.rows, machine.token_budget, machine.ranks, self.stop)
            metrics[LOSS] = float(losses.mean())
        # answers of a model on its way are in no file: they are made within one evaluation, or anew
        records = [
            answer_task(self.config, self.loaded, task, None, {}, "validation", self.stop) for task in self.tasks
        ]
        if records:
            shares = [sum(record["correct"] for record in of_task) / len(of_task) for of_task in records]
            metrics[EXACT_MATCH] = sum(shares) / len(shares)
        if samples := self._samples(records):
            self.show(step, visible(samples))
        return metrics

    def _samples(self, records: list[list[dict]]) -> str:
        """A few answers to the first problems of each task, else to the prompts of the first held-out pairs."""
        count = self.config.evaluation.samples
        if records:
            shown = [r for of_task in records for r in of_task[:count]]
            return "\n\n".join(f"prompt  {r['prompt']}\ngold    {r['answer']}\nanswer  {r['text']}" for r in shown)
        prompts = self.prompts[:count]
        if not prompts:
            return ""
        with lockstep(self.loaded.denoiser):
            if not self.loaded.machine.ranks.is_main:
                return ""
            texts = answer_ids(self.config, self.loaded, prompts, [str(i) for i in range(len(prompts))])
        asked = [self.loaded.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        return "\n\n".join(f"prompt  {a}\nanswer  {text}" for a, text in zip(asked, texts, strict=True))


def open_validation(config: RunConfig, prepared: PreparedPairs, loaded: Loaded, stop: StopFlag) -> Validation:
    """The validation pairs with their reference values, and the problems of tasks that have a validation split.

    Test problems are never looked at during training.
    """
    pairs = list(prepared.validation)[: config.evaluation.num_pairs]
    items, block = reference_values.measured_items(config, prepared, loaded, pairs, stop, "validation pairs")
    tasks = validation_tasks(config)
    prompts = list({pair.group: pair.prompt_ids for pair in pairs}.values())
    room = loaded.model.config.max_sequence_length - config.evaluation.gen_length
    fitting = [ids for ids in prompts if len(ids) <= room]
    if len(fitting) < len(prompts) and config.evaluation.samples and not tasks:
        print(
            f"note: {len(prompts) - len(fitting)} of {len(prompts)} validation prompts leave no room for an answer of "
            f"evaluation.gen_length={config.evaluation.gen_length}; samples show answers to others"
        )
    return Validation(config, loaded, items, block, tasks, stop, fitting)


def validation_tasks(config: RunConfig) -> list[Task]:
    """The tasks that have validation problems, with as many of them as an evaluation during training answers."""
    own = config.evaluation.tasks if config.evaluation.harness == "none" else []
    names = [name for name in own if name in HAS_VALIDATION_SPLIT]
    limit = min(VALIDATION_LIMIT, config.evaluation.limit or VALIDATION_LIMIT)
    return [open_task(config, name, "validation", limit) for name in names]


def stop_if_asked(folder: Path, stop: StopFlag, ranks: Ranks) -> None:
    """Between two parts of a run that cannot be stopped inside: a signal that came in the first keeps the second from
    starting."""
    if ranks.agree_to_stop(stop):
        raise Stopped(f"{folder}: stopped by {stop.name}; no step was under way.", "Give the command again.")


def gradient_scaler(machine: Machine) -> torch.amp.GradScaler | None:
    """The loss scaler that float16 needs; None elsewhere."""
    return torch.amp.GradScaler(machine.device.type) if machine.precision == "fp16" else None


def step_zero_check(config: RunConfig, task: DpoTask, settings: LoopSettings, precision: str) -> None:
    """Before the first step the policy is the reference: every draw agrees, every margin is 0, or the run stops here.

    Catches what would silently train on a wrong margin: a stale store, other masks, dropout, an adapter that is not
    neutral. Without common random numbers policy and reference saw other masks, and there is nothing to compare.
    """
    if not config.dpo.common_random_numbers:
        print("step 0: not checked, since dpo.common_random_numbers=false gives policy and reference other masks")
        return
    _, indices = step_items(settings.seed, 0, task.item_count, settings.items_per_step)
    items = task.items(indices, 0)
    draws = score_shared(task.denoiser, items, task.token_budget, task.ranks)
    reference = reference_draws(items, draws.device)
    difference = (draws - reference).abs()
    relative = float((difference / reference.abs().clamp(min=1.0)).max())
    losses = task.objective.losses(items, draws)
    at_zero = float(task.objective.losses(items, reference).mean())
    tolerance = STEP_ZERO_TOLERANCE[precision]
    if relative > tolerance:
        worst = items[int(difference.flatten(1).max(dim=1).values.argmax())].id
        raise RunFault(
            f"step 0: policy and reference differ by {float(difference.max()):.3g} nats on pair {worst} (relative "
            f"{relative:.2g}, allowed {tolerance:g} in {precision}), expected the same value before any training. The "
            "reference store may have been computed by another program or on faulty hardware: check it with "
            "python -m laddpo.precompute verify=true, or remove its folder."
        )
    print(
        f"step 0: loss {float(losses.mean()):.6f} (at margin 0: {at_zero:.6f}), largest |policy - reference| "
        f"{float(difference.max()):.2g} nats over {draws.numel()} draws"
    )
