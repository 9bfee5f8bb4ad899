"""A run of two steps on the longest pairs, of which only what it says is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from laddpo.core.losses import LOSSES
from laddpo.errors import Stopped
from laddpo.hardware.footprint import dry_run_text
from laddpo.hardware.planning import pairs_per_step, work_of
from laddpo.inputs.data import row_lengths
from laddpo.processes import signals
from laddpo.processes.ranks import here
from laddpo.training.resuming import held
from laddpo.training.run import Ended, Run


def dry_run(folder: Path, train: Callable[[Path, signals.StopFlag], None]) -> None:
    """`train(folder, stop)` for two steps on the longest batch, in a folder below `folder` that is removed afterwards.

    The report of a step that is not finite is kept.
    """
    place = folder / "dry_run"
    try:
        with held(place, "dry_run"), signals.stop_on_signal() as stop:
            try:
                train(place, stop)
            finally:
                if here().is_main and not (place / "fault").exists():
                    shutil.rmtree(place, ignore_errors=True)
    except Stopped:
        raise Stopped(
            "the dry run was stopped by a signal; nothing of it is kept.", "Give the command again."
        ) from None
    finally:
        if here().is_main:
            with contextlib.suppress(OSError):  # the user's own folder, with something in it
                folder.rmdir()


def two_steps(run: Run) -> Run:
    """The run with its longest pairs alone, without validation, evaluation and trackers."""
    config = run.config
    evaluation = dataclasses.replace(config.evaluation, at_end=False, num_pairs=0, tasks=[], every_steps=None)
    logger = dataclasses.replace(config.logger, tensorboard=False, wandb=False, trackers=[])
    config = dataclasses.replace(config, evaluation=evaluation, logger=logger, best_metric="none")
    data = run.data
    longest = longest_rows(row_lengths(data.prepared, config.dpo), pairs_per_step(config.optim, config.hardware))
    kinds = {"items": data.items, "mismatched": data.mismatched}
    picked = {name: rows if rows is None else [rows[i] for i in longest] for name, rows in kinds.items()}
    return dataclasses.replace(run, config=config, data=dataclasses.replace(data, **picked))


def say_forecast(run: Run, ended: Ended) -> None:
    """Memory and hours of the whole run, from its two steps."""
    if run.ranks.is_main:
        speed = ended.outputs.timing.read()[-1]["speed/tokens_per_s"]
        loss, rows = LOSSES[run.config.dpo.loss], len(row_lengths(run.data.prepared, run.config.dpo))
        tokens = work_of(run.config, run.data.lengths, rows).tokens * (1 + loss.has_baseline)
        print(dry_run_text(tokens, speed, loss.needs_reference))


def longest_rows(lengths: np.ndarray, count: int) -> list[int]:
    """The `count` rows with the most tokens: the batch that needs the most memory. # lengths as of row_lengths"""
    tokens = (lengths.shape[1] - 1) * lengths[:, 0] + lengths[:, 1:].sum(axis=1)
    return np.argsort(-tokens, kind="stable")[:count].tolist()
