"""Answers of a loaded model to the problems of a task, graded: what exact match is measured on.

Used during training (validation problems) and by `evaluate` (test problems, base beside tuned).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laddpo import runs
from laddpo.core.gradient import lockstep
from laddpo.errors import Stopped
from laddpo.evaluation.sampling import SamplerSettings, generate, until_stop
from laddpo.evaluation.tasks import (
    ARC_INSTRUCTION,
    GSM8K_INSTRUCTION,
    MATH500_INSTRUCTION,
    Answer,
    Generate,
    Task,
    TaskOptions,
    load_task,
    run_task,
)
from laddpo.inputs import Loaded, difficulty_of, encoder_for
from laddpo.preference.pairs import prompt_rows
from laddpo.ranges import EMBEDDED_TASKS
from laddpo.settings import RunConfig
from laddpo.signals import StopFlag

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
    evaluation = config.evaluation
    if name in EMBEDDED_TASKS:
        return {"difficulty": difficulty_of(config)} if name == "arithmetic" else {}
    of_rows = {"dataset_name": evaluation.dataset_name}
    if with_shots and evaluation.shots:
        of_rows["shots_from"] = evaluation.shots_from
    return {**of_rows, "grader": evaluation.grader} if name == "file" else of_rows


def tested_questions(config: RunConfig, name: str) -> set[str]:
    """The questions of a task's test problems, with and without what the task writes around them; without shots."""
    task = open_task(config, name, "test", None, with_shots=False)
    asked = {item.prompt[-1].content for item in task.items}
    task.grader.close()
    return asked | {question_in(text) for text in asked}


def question_in(text: str) -> str:
    """What is left of a task's prompt without the instruction at its end, and without the choices of a choice task."""
    for instruction in (GSM8K_INSTRUCTION, MATH500_INSTRUCTION):
        text = text.removesuffix(instruction)
    if text.endswith(ARC_INSTRUCTION):
        return text.removesuffix(ARC_INSTRUCTION).rpartition("\n\n")[0]
    return text


def sampler_settings(config: RunConfig) -> SamplerSettings:
    """The decoding that the evaluation group asks for."""
    names = {field.name for field in dataclasses.fields(SamplerSettings)} - {"seed"}
    return SamplerSettings(**{name: getattr(config.evaluation, name) for name in names}, seed=config.seed)


def answerer(config: RunConfig, loaded: Loaded) -> Generate:
    """A function from prompts to texts: the model as it is now, with the run's sampler."""
    answer = described_answerer(config, loaded)
    return lambda prompts: [described.text for described in answer(prompts)]


def described_answerer(config: RunConfig, loaded: Loaded) -> Generate:
    """As `answerer`, each text with its length and whether it was ended."""
    encoder = encoder_for(config, loaded.tokenizer)

    def answer(prompts: list) -> list[Answer]:
        # draws above temperature 0 belong to the question, so they are the same in any batch and after a resume
        keys = [runs.canonical_json(prompt_rows(prompt)) for prompt in prompts]
        return described_answers(config, loaded, [encoder.encode_prompt(prompt) for prompt in prompts], keys)

    return answer


def answer_ids(config: RunConfig, loaded: Loaded, prompts: list[np.ndarray], keys: list[str]) -> list[str]:
    """Answers to encoded prompts."""
    return [answer.text for answer in described_answers(config, loaded, prompts, keys)]


def described_answers(config: RunConfig, loaded: Loaded, prompts: list[np.ndarray], keys: list[str]) -> list[Answer]:
    """Answers to encoded prompts, each with its length and whether it was ended."""
    encoder = encoder_for(config, loaded.tokenizer)
    responses = generate(
        loaded.model,
        prompts,
        sampler_settings(config),
        mask_token_id=loaded.denoiser.mask_token_id,
        stop_token_ids=encoder.stop_ids,
        keys=keys,
        autocast=loaded.denoiser.autocast,
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
    answer, ranks = described_answerer(config, loaded), loaded.machine.ranks

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
