"""Runs of a study that start from other runs: `{name}` in an override is the folder of that run with the same seed.

    first:
      - {name: base, stage: sft, overrides: [experiment=make_rubric_base]}
    arms:
      - {name: sft, stage: sft, overrides: ["model.model_name_or_path={base}/model"]}
      - {name: dpo, overrides: ["model.model_name_or_path={base}/model", "adapter.path={sft}/adapter"]}

What is kept about a run has the name, so that a study may be moved; its command has the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from laddpo.errors import nearest
from laddpo.jobs import runner
from laddpo.settings.stage_schema import StudyArm, StudyRun, StudySettings

StudyJob = StudyArm | StudyRun
Overrides = Callable[[StudyJob], list[str]]  # all settings of a run, without its seed
PLACE = re.compile(r"\{([\w.-]+)\}(/[^{}]*)?")  # a whole value; other braces are Hydra's


def started_from(overrides: Iterable[str]) -> list[str]:
    """The names of the runs whose folders these settings name, each once."""
    found = (PLACE.fullmatch(text.partition("=")[2]) for text in overrides)
    return list(dict.fromkeys(match[1] for match in found if match))


def with_folders(overrides: Iterable[str], folder: Path, seed: int) -> list[str]:
    """The overrides with the folder of each named run in the place of its name."""
    made = []
    for text in overrides:
        key, _, value = text.partition("=")
        if match := PLACE.fullmatch(value):
            text = f"{key}={runner.quoted(f'{folder}/{match[1]}-{seed}' + (match[2] or ''))}"
        made.append(text)
    return made


def start_problems(study: StudySettings, settings_of: Overrides) -> list[str]:
    """Names of runs that do not exist or do not come before, and runs of study.first that no other one needs."""
    problems, known, used = [], [], set()
    for run in (*study.first, *study.arms):
        place = "study.arms" if run in study.arms else "study.first"
        for name in started_from(settings_of(run)):
            used.add(name)
            if name not in known:
                guess = nearest(name, known)
                hint = f"; did you mean {guess}?" if guess else "; name one of them, or put that run before."
                problems.append(
                    f"{place}, {run.name}: {{{name}}} is the folder of a run that comes before; those are: "
                    f"{', '.join(known) or 'none'}{hint}"
                )
        known.append(run.name)
    return problems + [
        f"study.first, {run.name}: no run starts from it; write {{{run.name}}}/model or {{{run.name}}}/adapter as a "
        "setting of one, or leave it out."
        for run in study.first
        if run.name not in used
    ]


def with_starts(study: StudySettings, wanted: Sequence[StudyArm], settings_of: Overrides) -> list[StudyJob]:
    """The wanted arms and all runs that they start from, in the order in which they can run."""
    needed = {arm.name for arm in wanted}
    every = [*study.first, *study.arms]
    for run in reversed(every):
        if run.name in needed:
            needed.update(started_from(settings_of(run)))
    return [run for run in every if run.name in needed]
