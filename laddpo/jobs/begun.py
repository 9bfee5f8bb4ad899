"""What a sweep or a study was begun with, held against the command line that goes on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.results.of_jobs import JOB_FILE, JOB_KEYS
from laddpo.settings.of_a_run import read_command
from laddpo.storage.seals import read_checked

# Settings of which a job's result knows nothing, as overrides begin.
CHANGE_NO_RESULT = (
    *("logger", "logging_steps=", "save_", "paths.", "auto=", "hardware.threads=", "hardware.vram_gib="),
    *("hydra.launcher", "hydra/launcher"),
)


def overrides_to_resume(folder: Path, stage: str, given: list[str]) -> list[str]:
    """The overrides with which a sweep goes on: those that it was begun with, and of the command line what changes no
    result of a job. An earlier version kept none: then the command line has them all."""
    kept = read_command(folder)
    if not kept:
        return given
    added = [text for text in given if text not in kept["overrides"]]
    other = [text for text in added if not text.lstrip("+").startswith(CHANGE_NO_RESULT)]
    if other or kept["stage"] != stage:
        begun = " ".join([kept["stage"], *(text for text in kept["overrides"] if text not in given)])
        raise UserError(
            f"{folder}: was begun with {begun}, not with {' '.join(other) or stage}; repeat the same command, or leave "
            "its settings out: a sweep that goes on takes those of its folder."
        )
    return [*kept["overrides"], *added]


def begun_otherwise(folder: Path, overrides: Sequence[str]) -> list[str]:
    """The problem, if it is one, that the job in this folder was begun with other overrides."""
    path = folder / JOB_FILE
    if not path.exists():
        return []
    try:
        held, wanted = read_checked(path, JOB_KEYS)["overrides"], list(overrides)
    except UserError as error:
        return list(error.problems)
    held, wanted = ([text for text in a if not text.lstrip("+").startswith(CHANGE_NO_RESULT)] for a in (held, wanted))
    if held == wanted:
        return []
    was, now = ([text for text in a if text not in b] for a, b in ((held, wanted), (wanted, held)))
    if not was and not now:  # the same ones in another order
        was, now = held, wanted
    begun = f"was begun with {' '.join(was)}, " if was else "was begun "
    asked = f"{'not with' if was else 'without'} {' '.join(now)}" if now else "which is not asked for now"
    return [f"{folder.parent}: {begun}{asked}; repeat the same command, or choose another output_dir."]


def problems_by_job(found: Mapping[Any, Sequence[str]], among: str) -> list[str]:
    """Each problem once, with the first five of the jobs that have it."""
    where: dict[str, list[str]] = {}
    for job, problems in found.items():
        for problem in problems:
            where.setdefault(problem, []).append(str(job))
    return [
        f"{problem} (job {', '.join(jobs[:5])}{', ...' if len(jobs) > 5 else ''} {among})"
        for problem, jobs in where.items()
    ]
