"""Validation during training: the metric that chooses the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from laddpo.core.gradient import Item, lockstep
from laddpo.errors import visible
from laddpo.evaluation.answering import VALIDATION_LIMIT, answer_ids, answer_task, open_task
from laddpo.evaluation.heldout import row_losses
from laddpo.inputs import reference_values
from laddpo.inputs.margins import score_preferences
from laddpo.inputs.policy import Loaded
from laddpo.preference.prepared import PreparedPairs
from laddpo.problems.tasks import Task, embedded
from laddpo.processes.signals import StopFlag
from laddpo.settings.schema import RunConfig

EXACT_MATCH, LOSS = "validation/exact_match", "validation/loss"


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
    limit = min(VALIDATION_LIMIT, config.evaluation.limit or VALIDATION_LIMIT)
    return [open_task(config, name, "validation", limit) for name in embedded(own)]
