"""Answers of a loaded model to the problems of a task, graded: what exact match is measured on.

Used during training (validation problems) and by `evaluate` (test problems, base beside tuned).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.core.gradient import lockstep
from laddpo.errors import Stopped, UserError
from laddpo.evaluation.run_task import Answer, Generate, run_task
from laddpo.evaluation.sampling import SamplerSettings, generate, require_room, until_stop
from laddpo.inputs.data import difficulty_of, encoder_for
from laddpo.inputs.policy import Loaded
from laddpo.preference.reading.bad_rows import LISTED, RowError
from laddpo.preference.reading.pairs import Prompt, prompt_rows
from laddpo.problems.tasks import TASKS, Task, TaskOptions, load_task, question_in
from laddpo.processes.signals import StopFlag
from laddpo.settings.schema import RunConfig
from laddpo.storage import atomic

VALIDATION_LIMIT = 200  # problems answered at every evaluation during training: an interval of about +-7 points


def open_task(config: RunConfig, name: str, split: str, limit: int | None, *, with_shots: bool = True) -> Task:
    """The task's items of a split; generated ones with the difficulty of the data."""
    return load_task(
        name,
        TaskOptions(
            split=split,
            limit=limit,
            seed=config.seed,
            benchmarks_dir=Path(config.paths.data_dir) / "benchmarks",
            **({"shots": config.evaluation.shots} if with_shots else {}),
            **_of_task(config, name, with_shots),
        ),
    )


def _of_task(config: RunConfig, name: str, with_shots: bool) -> dict[str, Any]:
    """What only some tasks ask for: the difficulty of generated problems, or the rows of others and their grader."""
    evaluation, kind = config.evaluation, TASKS.get(name)
    if kind is None:  # the harness's, or none: load_task says so
        return {}
    if kind.is_embedded:
        return {"difficulty": difficulty_of(config.data)} if kind.has_difficulty else {}
    of_rows = {"dataset_name": evaluation.dataset_name}
    if with_shots and evaluation.shots:
        of_rows["shots_from"] = evaluation.shots_from
    return {**of_rows, "grader": evaluation.grader} if kind.takes_grader else of_rows


def tested_questions(config: RunConfig, name: str) -> set[str]:
    """The questions of a task's test problems, with and without what the task writes around them; without shots."""
    task = open_task(config, name, "test", None, with_shots=False)
    asked = {item.prompt[-1].content for item in task.items}
    task.grader.close()
    return asked | {question_in(text) for text in asked}


def sampler_settings(config: RunConfig) -> SamplerSettings:
    """The decoding that the evaluation group asks for."""
    names = {field.name for field in dataclasses.fields(SamplerSettings)} - {"seed"}
    return SamplerSettings(**{name: getattr(config.evaluation, name) for name in names}, seed=config.seed)


def encoded_prompts(config: RunConfig, loaded: Loaded, prompts: Sequence[Prompt], names: Sequence[str]) -> list:
    """Token ids of all prompts that will be answered. `UserError` names those that cannot be, before any answer."""
    encoder = encoder_for(config.data, loaded.tokenizer)
    encoded, problems = [], []
    for prompt, name in zip(prompts, names, strict=True):
        try:
            encoded.append(encoder.encode_prompt(prompt))
        except RowError as error:
            problems.append(str(error.at(name)))
    if problems:
        more = [f"{len(problems) - LISTED} more prompts cannot be encoded."] if len(problems) > LISTED else []
        raise UserError(*problems[:LISTED], *more)
    lengths, positions = [len(ids) for ids in encoded], loaded.model.config.max_sequence_length
    require_room(lengths, config.evaluation.gen_length, positions, names)
    return encoded


def answerer(config: RunConfig, loaded: Loaded, prompts: Sequence[Prompt], names: Sequence[str]) -> Generate:
    """A function from some of these prompts to answers: the model as it is then, with the run's sampler."""
    encoded = dict(zip(prompts, encoded_prompts(config, loaded, prompts, names), strict=True))

    def answer(asked: list) -> list[Answer]:
        # draws above temperature 0 belong to the question, so they are the same in any batch and after a resume
        keys = [atomic.canonical_json(prompt_rows(prompt)) for prompt in asked]
        return described_answers(config, loaded, [encoded[prompt] for prompt in asked], keys)

    return answer


def answer_ids(config: RunConfig, loaded: Loaded, prompts: list[np.ndarray], keys: list[str]) -> list[str]:
    """Answers to encoded prompts."""
    return [answer.text for answer in described_answers(config, loaded, prompts, keys)]


def described_answers(config: RunConfig, loaded: Loaded, prompts: list[np.ndarray], keys: list[str]) -> list[Answer]:
    """Answers to encoded prompts, each with its length and whether it was ended."""
    encoder = encoder_for(config.data, loaded.tokenizer)
    responses = generate(
        loaded.model,
        prompts,
        sampler_settings(config),
        mask_token_id=loaded.denoiser.mask_token_id,
        stop_token_ids=encoder.stop_ids,
        keys=keys,
        autocast=loaded.denoiser.autocast,
        eos_token_id=encoder.eos_id,
    )
    lengths = [len(until_stop(response, encoder.stop_ids)) for response in responses]
    return [
        Answer(encoder.decode_response(response), length, length < len(response))
        for response, length in zip(responses, lengths, strict=True)
    ]


def answer_task(
    config: RunConfig,
    loaded: Loaded,
    task: Task,
    items_path: Path | None,
    weights: Mapping[str, Any],
    label: str,
    stop: StopFlag | None = None,
) -> list[dict[str, Any]]:
    """One graded record per item, appended to `items_path` as they come; records of the same weights are reused. None:
    nothing is written.

    Raises `Stopped` between two batches after a signal; the same command then goes on with the next batch, or without
    a file begins this task again.
    """
    names = [f"{task.name}, item {item.id}" for item in task.items]
    answer, ranks = answerer(config, loaded, [item.prompt for item in task.items], names), loaded.machine.ranks

    def answer_unless_stopped(prompts: list) -> list[Answer]:
        if ranks.agree_to_stop(stop):
            kept = f"{items_path}: stopped by {stop.name}; the answers so far are kept."
            unkept = f"{label} of {task.name}: stopped by {stop.name}; its answers are not kept."
            raise Stopped(kept if items_path else unkept, "Give the command again.")
        with lockstep(loaded.denoiser):
            return answer(prompts) if prompts else []

    return run_task(
        answer_unless_stopped,
        task,
        batch_size=config.evaluation.batch_size,
        items_path=items_path,
        fields={"weights": dict(weights), "sampler": dataclasses.asdict(sampler_settings(config))},
        labels={"model": label},
        ranks=ranks,
    )
