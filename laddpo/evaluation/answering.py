"""Answers of a loaded model to the problems of a task, graded: what exact match is measured on.

Used during training (validation problems) and by `evaluate` (test problems, base beside tuned).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.core.gradient import lockstep
from laddpo.errors import Stopped, UserError
from laddpo.evaluation.run_task import Answer, Generate, SharedAnswers, run_task
from laddpo.evaluation.sampling import SamplerSettings, generate, require_room, settings_for, until_stop
from laddpo.inputs.data import difficulty_of, encoder_for
from laddpo.inputs.policy import Loaded
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.reading.bad_rows import LISTED, RowError
from laddpo.preference.reading.pairs import Prompt, prompt_rows
from laddpo.problems.tasks import TASKS, Task, TaskOptions, load_task, question_in
from laddpo.processes.signals import StopFlag
from laddpo.settings.schema import DataSettings, EvaluationSettings
from laddpo.storage import atomic

VALIDATION_LIMIT = 200  # problems answered at every evaluation during training: an interval of about +-7 points


def open_task(
    name: str,
    split: str,
    limit: int | None,
    evaluation: EvaluationSettings,
    data: DataSettings,
    seed: int,
    data_dir: str,
    *,
    with_shots: bool = True,
) -> Task:
    """The task's items of a split; generated ones with the difficulty of the data."""
    return load_task(
        name,
        TaskOptions(
            split=split if name not in TASKS or TASKS[name].is_embedded else evaluation.dataset_split or split,
            limit=limit,
            seed=seed,
            benchmarks_dir=Path(data_dir) / "benchmarks",
            **({"shots": evaluation.shots} if with_shots else {}),
            **_of_task(name, evaluation, data, with_shots),
        ),
    )


def _of_task(name: str, evaluation: EvaluationSettings, data: DataSettings, with_shots: bool) -> dict[str, Any]:
    """What only some tasks ask for: the difficulty of generated problems, or the rows of others and their grader."""
    kind = TASKS.get(name)
    if kind is None:  # the harness's, or none: load_task says so
        return {}
    if kind.is_embedded:
        return {"difficulty": difficulty_of(data)} if kind.has_difficulty else {}
    of_rows = {"dataset_name": evaluation.dataset_name}
    if with_shots and evaluation.shots:
        of_rows["shots_from"] = evaluation.shots_from
    return {**of_rows, "grader": evaluation.grader} if kind.takes_grader else of_rows


def tested_questions(
    name: str, evaluation: EvaluationSettings, data: DataSettings, seed: int, data_dir: str
) -> set[str]:
    """The questions of a task's test problems, with and without what the task writes around them; without shots."""
    task = open_task(name, "test", None, evaluation, data, seed, data_dir, with_shots=False)
    asked = {item.prompt[-1].content for item in task.items}
    task.grader.close()
    return asked | {question_in(text) for text in asked}


def sampler_settings(evaluation: EvaluationSettings, seed: int, model_block: int | None) -> SamplerSettings:
    """The decoding that the evaluation group asks for, in the blocks of a block model (`model_block` positions each)
    or, with None, in its own. Where the settings know the model's blocks, they refused others before."""
    names = {field.name for field in dataclasses.fields(SamplerSettings)} - {"seed"}
    values = {name: getattr(evaluation, name) for name in names} | {"seed": seed}
    own = {"block_length": model_block, "block_cache": "none"} if model_block else {}
    return settings_for(model_block, **{**values, **own})


@dataclass(frozen=True)
class Answerer:
    """A loaded model that answers: with the weights that it has at the call."""

    loaded: Loaded
    encoder: TextEncoder
    sampler: SamplerSettings

    def encode(self, prompts: Sequence[Prompt], names: Sequence[str]) -> list[np.ndarray]:
        """Token ids of all prompts that will be answered. `UserError` names those that cannot be, before any answer."""
        encoded = self.encoder.encode_prompts(list(prompts))
        problems = [
            str(outcome.at(name)) for outcome, name in zip(encoded, names, strict=True) if isinstance(outcome, RowError)
        ]
        if problems:
            more = [f"{len(problems) - LISTED} more prompts cannot be encoded."] if len(problems) > LISTED else []
            raise UserError(*problems[:LISTED], *more)
        lengths, positions = [len(ids) for ids in encoded], self.loaded.model.config.max_sequence_length
        require_room(lengths, self.sampler.gen_length, positions, names)
        return encoded

    def responses(self, encoded: Sequence[np.ndarray], keys: Sequence[str]) -> list[np.ndarray]:
        """Token ids of answers to encoded prompts, in batches of `sampler.batch_size`. Draws belong to the keys."""
        return generate(
            self.loaded.model,
            encoded,
            self.sampler,
            mask_token_id=self.loaded.denoiser.mask_token_id,
            stop_token_ids=self.encoder.stop_ids,
            keys=keys,
            autocast=self.loaded.denoiser.autocast,
            eos_token_id=self.encoder.eos_id,
            budget=self.loaded.machine.answer_budget,
        )

    def answers(self, encoded: Sequence[np.ndarray], keys: Sequence[str]) -> list[Answer]:
        """What `responses` gives, as texts, each with its length and whether it was ended."""
        responses = self.responses(encoded, keys)
        lengths = [len(until_stop(response, self.encoder.stop_ids)) for response in responses]
        return [
            Answer(self.encoder.decode_response(response), length, length < len(response))
            for response, length in zip(responses, lengths, strict=True)
        ]

    def to(self, prompts: Sequence[Prompt], names: Sequence[str]) -> Generate:
        """A function from some of these prompts to answers."""
        encoded = dict(zip(prompts, self.encode(prompts, names), strict=True))

        def answer(asked: list) -> list[Answer]:
            # draws above temperature 0 belong to the question, so they are the same in any batch and after a resume
            keys = [atomic.canonical_json(prompt_rows(prompt)) for prompt in asked]
            return self.answers([encoded[prompt] for prompt in asked], keys)

        return answer

    def texts(self, prompts: Sequence[Prompt], names: Sequence[str]) -> list[str]:
        """The texts of the answers to all these prompts."""
        answer, size = self.to(prompts, names), self.sampler.batch_size
        return [given.text for start in range(0, len(prompts), size) for given in answer(prompts[start : start + size])]


def answerer(loaded: Loaded, evaluation: EvaluationSettings, data: DataSettings, seed: int) -> Answerer:
    """The model with the encoding of the data and the decoding of the evaluation."""
    encoder = encoder_for(data, loaded.tokenizer)
    sampler = sampler_settings(evaluation, seed, loaded.model.block_length)
    return Answerer(loaded, encoder, sampler)


def answer_task(
    answers: Answerer,
    task: Task,
    items_path: Path | None,
    weights: Mapping[str, Any],
    label: str,
    stop: StopFlag | None = None,
    kept: SharedAnswers | None = None,
) -> list[dict[str, Any]]:
    """One graded record per item, appended to `items_path` as they come; records of the same weights are reused. None:
    nothing is written. `kept`: answers of earlier runs of the same model.

    Raises `Stopped` between two batches after a signal; the same command then continues with the next batch, or without
    a file begins this task again.
    """
    names = [f"{task.name}, item {item.id}" for item in task.items]
    answer, ranks = answers.to([item.prompt for item in task.items], names), answers.loaded.machine.ranks

    def answer_unless_stopped(prompts: list) -> list[Answer]:
        if ranks.agree_to_stop(stop):
            written = f"{items_path}: stopped by {stop.name}; the answers so far are kept."
            unwritten = f"{label} of {task.name}: stopped by {stop.name}; its answers are not kept."
            raise Stopped(written if items_path else unwritten, "Give the command again.")
        with lockstep(answers.loaded.denoiser):
            return answer(prompts) if prompts else []

    return run_task(
        answer_unless_stopped,
        task,
        batch_size=answers.sampler.batch_size,
        items_path=items_path,
        fields={"weights": dict(weights), "sampler": dataclasses.asdict(answers.sampler)},
        labels={"model": label},
        ranks=ranks,
        kept=kept,
    )
