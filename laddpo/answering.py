"""Answers of a loaded model to the problems of a task, graded: what exact match is measured on.

Used during training (validation problems) and by `evaluate` (test problems, base beside tuned).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laddpo import runs
from laddpo.evaluation.sampling import SamplerSettings, generate
from laddpo.evaluation.tasks import Generate, Task, TaskOptions, load_task, run_task
from laddpo.inputs import Loaded, encoder_for
from laddpo.preference.arithmetic import Difficulty
from laddpo.preference.pairs import prompt_rows
from laddpo.settings import RunConfig

VALIDATION_LIMIT = 200  # problems answered at every evaluation during training: an interval of about +-7 points


def open_task(config: RunConfig, name: str, split: str, limit: int | None) -> Task:
    """The task's items of a split; generated ones with the difficulty of the data."""
    evaluation = config.evaluation
    return load_task(
        name,
        TaskOptions(
            split=split,
            limit=limit,
            seed=config.seed,
            shots=evaluation.shots,
            dataset_name=evaluation.dataset_name,
            shots_from=evaluation.shots_from,
            benchmarks_dir=Path(config.paths.data_dir) / "benchmarks",
            difficulty=Difficulty(operand_max=config.data.operand_max),
        ),
    )


def sampler_settings(config: RunConfig) -> SamplerSettings:
    """The decoding that the evaluation group asks for."""
    names = {field.name for field in dataclasses.fields(SamplerSettings)}
    chosen = {name: value for name, value in dataclasses.asdict(config.evaluation).items() if name in names}
    return SamplerSettings(**chosen, seed=config.seed)


def answerer(config: RunConfig, loaded: Loaded) -> Generate:
    """A function from prompts to texts: the model as it is now, with the run's sampler."""
    encoder = encoder_for(config, loaded.tokenizer)
    settings = sampler_settings(config)

    def answer(prompts: list) -> list[str]:
        responses = generate(
            loaded.model,
            [encoder.encode_prompt(prompt) for prompt in prompts],
            settings,
            mask_token_id=loaded.denoiser.mask_token_id,
            stop_token_ids=encoder.stop_ids,
            # draws above temperature 0 belong to the question, so they are the same in any batch and after a resume
            keys=[runs.canonical_json(prompt_rows(prompt)) for prompt in prompts],
            autocast=loaded.denoiser.autocast,
        )
        return [encoder.decode_response(response) for response in responses]

    return answer


def answer_task(
    config: RunConfig, loaded: Loaded, task: Task, items_path: Path, weights: Mapping[str, Any], label: str
) -> list[dict[str, Any]]:
    """One graded record per item, appended to `items_path` as they come; records of the same weights are reused."""
    return run_task(
        answerer(config, loaded),
        task,
        batch_size=config.evaluation.batch_size,
        items_path=items_path,
        fields={"weights": dict(weights), "sampler": dataclasses.asdict(sampler_settings(config))},
        labels={"model": label},
    )
