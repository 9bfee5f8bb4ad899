"""Test problems answered at several temperatures, and answers with partial marks: their entries of results.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from laddpo.evaluation.answering import Answerer
from laddpo.problems.tasks import Task

Record = Mapping[str, Any]


def at_temperatures(answers: Answerer, temperatures: Sequence[float]) -> Iterator[tuple[str, Answerer]]:
    """The model as it answers, with "", then at each further temperature, with what it adds to the model's name."""
    yield "", answers
    for temperature in temperatures:
        sampler = dataclasses.replace(answers.sampler, temperature=temperature)
        yield f" at temperature {temperature:g}", dataclasses.replace(answers, sampler=sampler)


def key_of(name: str, said: str) -> str:
    """The name of a result at a further temperature: exact_match_at_temperature_1."""
    return name + said.replace(" ", "_")


def mark_values(task: Task, records: Sequence[Record]) -> dict[str, list[float]]:
    """By result, the value of each answer: mean_marks, and share_<mark> for each mark. Empty for other tasks."""
    if task.marks is None:
        return {}
    found = [task.marks(record["text"], record["answer"]) for record in records]
    shares = {f"share_{name}": [float(has[name]) for has in found] for name in found[0]}
    return {"mean_marks": [float(sum(has.values())) for has in found], **shares}
