"""Validation during training: the metric that chooses the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from laddpo.core.completions import CompletionObjective
from laddpo.core.gradient import Item, lockstep
from laddpo.core.objectives import DpoObjective
from laddpo.errors import visible
from laddpo.evaluation.answering import VALIDATION_LIMIT, Answerer, answer_task, answerer, open_task
from laddpo.evaluation.base_answers import BaseAnswers, base_answers
from laddpo.evaluation.heldout import row_losses
from laddpo.inputs.margins import CompletionRewards, PreferenceScores, score_preferences, scores_of_reference
from laddpo.inputs.policy import Loaded
from laddpo.problems.tasks import Task, embedded
from laddpo.processes.signals import StopFlag
from laddpo.settings.schema import DataSettings, EvaluationSettings, QuantizationSettings

EXACT_MATCH, LOSS = "validation/exact_match", "validation/loss"
MEAN_MARKS = "validation/mean_marks"  # of a task with partial marks


@dataclass
class Validation:
    """What is measured during training: held-out pairs or completions (`items` in noise blocks of `block`, with the
    `objective`) or `rows` of an SFT, and the problems of `tasks`. `metric`: best_metric as given. `of_base` keeps the
    answers of step 0 for other runs. `show(step, text)` takes `sample_count` answers as they are now; where no task is
    answered they are made for `prompts`."""

    loaded: Loaded
    answers: Answerer
    metric: str
    sample_count: int
    stop: StopFlag
    tasks: Sequence[Task] = ()
    prompts: Sequence[np.ndarray] = ()
    items: Sequence[Item] = ()
    block: int = 1
    objective: DpoObjective | CompletionObjective | None = None
    rows: Sequence[Item] = ()
    of_base: BaseAnswers | None = None
    show: Callable[[int, str], None] = lambda step, text: None

    @property
    def is_wanted(self) -> bool:
        return bool(self.items or self.rows or self.tasks)

    @property
    def best_metric(self) -> str | None:
        """What chooses the checkpoint: exact match where the data has a grader, else the validation loss."""
        if self.metric != "auto":
            return None if self.metric == "none" else f"validation/{self.metric}"
        return EXACT_MATCH if self.tasks else LOSS if self.items or self.rows else None

    def measure(self, step: int) -> dict[str, float]:
        """Validation metrics of the model as it is now."""
        metrics: dict[str, float] = {}
        if self.items:
            metrics.update(self._scores(step).metrics())
        if self.rows:
            machine = self.loaded.machine
            losses = row_losses(self.loaded.denoiser, self.rows, machine.token_budget, machine.ranks, self.stop)
            metrics[LOSS] = float(losses.mean())
        # answers during training are written to no file: a stopped validation starts again
        base = self.of_base if step == 0 else None
        weights = self.loaded.weights if base else {}
        answered = (None, weights, "validation", self.stop, base)
        records = [answer_task(self.answers, task, *answered) for task in self.tasks]
        if records:
            shares = [sum(record["correct"] for record in of_task) / len(of_task) for of_task in records]
            metrics[EXACT_MATCH] = sum(shares) / len(shares)
        for of_task in records:
            if of_task and "marks" in of_task[0]:
                metrics[MEAN_MARKS] = sum(sum(record["marks"].values()) for record in of_task) / len(of_task)
        if samples := self._samples(records):
            self.show(step, visible(samples))
        return metrics

    def _scores(self, step: int) -> PreferenceScores | CompletionRewards:
        """Of the held-out items. Training starts at the reference: the values of step 0 are the stored ones."""
        measured = (self.items, self.objective, self.block)
        if step == 0 and self.objective.needs_reference:
            return scores_of_reference(*measured)
        machine = self.loaded.machine
        return score_preferences(self.loaded.denoiser, *measured, machine.token_budget, machine.ranks, self.stop)

    def _samples(self, records: list[list[dict]]) -> str:
        """A few answers to the first problems of each task, else to the prompts of the first held-out pairs."""
        count = self.sample_count
        if records:
            shown = [r for of_task in records for r in of_task[:count]]
            return "\n\n".join(f"prompt  {r['prompt']}\ngold    {r['answer']}\nanswer  {r['text']}" for r in shown)
        prompts = self.prompts[:count]
        if not prompts:
            return ""
        with lockstep(self.loaded.denoiser):
            if not self.loaded.machine.ranks.is_main:
                return ""
            answers = self.answers.answers(prompts, [str(i) for i in range(len(prompts))])
        asked = [self.loaded.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        return "\n\n".join(f"prompt  {a}\nanswer  {b.text}" for a, b in zip(asked, answers, strict=True))


def open_validation(
    loaded: Loaded,
    evaluation: EvaluationSettings,
    data: DataSettings,
    quantization: QuantizationSettings,
    seed: int,
    data_dir: str,
    metric: str,
    stop: StopFlag,
    prompts: Sequence[np.ndarray] = (),
    **measured: Any,
) -> Validation:
    """What is `measured` (fields of Validation), with the problems of tasks that have a validation split. `prompts`:
    those of held-out pairs. Test problems are never looked at during training."""
    own = evaluation.tasks if evaluation.harness == "none" else []
    limit = min(VALIDATION_LIMIT, evaluation.limit or VALIDATION_LIMIT)
    tasks = [open_task(name, "validation", limit, evaluation, data, seed, data_dir) for name in embedded(own)]
    room = loaded.model.config.max_sequence_length - evaluation.gen_length
    fitting = [ids for ids in prompts if len(ids) <= room]
    if len(fitting) < len(prompts) and evaluation.samples and not tasks:
        print(
            f"note: {len(prompts) - len(fitting)} of {len(prompts)} validation prompts leave no room for an answer of "
            f"evaluation.gen_length={evaluation.gen_length}; samples show answers to others"
        )
    answers = answerer(loaded, evaluation, data, seed)
    of_base = base_answers(data_dir, quantization, answers)
    return Validation(loaded, answers, metric, evaluation.samples, stop, tasks, fitting, of_base=of_base, **measured)
