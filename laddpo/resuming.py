"""Which folder a training run writes to, and whether it goes on where an earlier one stopped.

`resume` is false (a new run), true (output_dir, else the newest unfinished run of equal settings) or a run's folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from laddpo import runs
from laddpo.compose import read_config
from laddpo.core.ranks import here
from laddpo.errors import Stopped, UserError
from laddpo.planning import pairs_per_process, pairs_per_step
from laddpo.settings import RunConfig
from laddpo.visible import visible

# What a resumed run may change: where it runs, how it reports, how often it saves, and how long it trains. What is
# recommended for a model is where other settings take their values from: those are compared. Of a step's pairs the
# number is compared and not its factors, which change no value.
MAY_CHANGE = (
    "output_dir", "resume", "auto", "verify", "run", "runs", "dry_run", "logging_steps", "save_", "logger.", "paths.",
    "model.recommended.", "hardware.", "evaluation.at_end", "optim.max_train_steps", "optim.num_train_epochs",
    "optim.per_device_train_batch_size", "optim.gradient_accumulation_steps",
)  # fmt: skip


@dataclass(frozen=True)
class RunPlace:
    """Where a run writes; `is_resumed`: an earlier part of it is there; `is_finished`: nothing is left to do."""

    folder: Path
    is_resumed: bool = False
    is_finished: bool = False


def find_run(config: RunConfig, new_folder: Path, stage: str) -> RunPlace:
    """Decide from `resume`; of several processes rank 0 does.

    Raises `UserError` listing the differing settings when the run there is another one.
    """
    ranks = here()
    found = _find_run(config, new_folder, stage) if ranks.is_main else None
    folder, *rest = ranks.broadcast([str(found.folder), found.is_resumed, found.is_finished] if found else None)
    return RunPlace(Path(folder), *rest)


def check_finished(config: RunConfig, folder: Path, kind: str) -> None:
    """Say that nothing is left to do, once the run is found whole and no more than it did is asked for."""
    from laddpo.tuned import tuned_weights

    runs.read_manifest(folder, kind)
    refuse_longer_training(config, folder)
    tuned_weights(config, folder)
    print(f"{folder}: this run is finished; nothing was changed.")


def refuse_longer_training(config: RunConfig, folder: Path) -> None:
    """A finished run's learning rate has come down; more steps are a new run that starts from its weights."""
    from laddpo.inputs import ADAPTER, MODEL

    stored = read_config(folder).optim
    is_full = config.adapter.kind == "full"
    start = f"model.model_name_or_path={folder / MODEL}" if is_full else f"adapter.path={folder / ADAPTER}"
    for name in ("max_train_steps", "num_train_epochs"):
        if getattr(stored, name) != getattr(config.optim, name):
            raise UserError(
                f"{folder}: is finished with optim.{name}={getattr(stored, name)}, and {getattr(config.optim, name)} "
                f"was asked for. Start a new run from its weights: {start}."
            )


def step_processes(config: RunConfig, place: RunPlace) -> RunConfig:
    """The settings with the number of processes that a step's pairs are counted for: in a resumed run such that each
    step has the pairs it would have had, in any number of processes."""
    if place.is_resumed:
        return _counted_like(_read_run(place.folder), config)
    return _counted_for(config, config.hardware.processes or here().world)


def _counted_like(stored: RunConfig, wanted: RunConfig) -> RunConfig:
    """`wanted` with the processes that its steps are counted for: as set; else those that the run began with, or, where
    a process is given other pairs than it had, those launched."""
    is_same_share = pairs_per_process(stored) == pairs_per_process(wanted)
    began_with = stored.hardware.processes if is_same_share else here().world
    return _counted_for(wanted, wanted.hardware.processes or began_with)


def _read_run(folder: Path) -> RunConfig:
    """The settings of the run in `folder`; where it says nothing of processes it began in one."""
    stored = read_config(folder)
    return _counted_for(stored, stored.hardware.processes or 1)


def _counted_for(config: RunConfig, processes: int) -> RunConfig:
    return dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, processes=processes))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this run; of several processes rank 0 does, for all."""
    if not here().is_main:
        yield
        return
    with runs.locked(folder, wait=False):
        yield


@contextlib.contextmanager
def told_to_resume(folder: Path, way: str | None = None) -> Iterator[None]:
    """A stop inside the block ends with how to go on in `folder`, once that is a run: by `resume=`, or by `way` where
    there are no steps."""
    try:
        yield
    except Stopped as stopped:
        if not (folder / "config.yaml").exists():
            raise
        has_steps = any(folder.glob("checkpoints/step_*")) or any(folder.glob("round_*/checkpoints/step_*"))
        again = "" if way or has_steps else " It has no checkpoint yet and starts at step 0 again."
        cure = f"Continue with the same command and {way or f'resume={folder}'}.{again}"
        raise Stopped(stopped.found, cure) from None


def _find_run(config: RunConfig, new_folder: Path, stage: str) -> RunPlace:
    if config.resume == "false":
        return RunPlace(new_folder)
    if config.resume != "true":
        folder = Path(config.resume)
        if not (folder / "config.yaml").exists():
            raise UserError(f"resume is {config.resume!r}, which holds no run (no config.yaml); check the path.")
        return _existing(config, folder)
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        if (folder / "config.yaml").exists():
            return _existing(config, folder)
        print(f"resume=true, but {folder} holds no run yet; starting a new one there.")
        return RunPlace(folder)
    earlier = Path(config.paths.outputs_dir) / stage
    for config_file in sorted(earlier.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        folder = config_file.parent
        if (folder / runs.MANIFEST).exists():
            continue
        try:
            stored = _read_run(folder)
        except UserError as error:
            print(visible(f"note: resume=true: passing over an unfinished run. {error}"))
            continue
        if not changed_settings(stored, config):
            print(f"resume=true: going on with {folder}")
            return RunPlace(folder, is_resumed=True)
    print(f"resume=true, but {earlier} has no unfinished run of these settings; starting a new one.")
    return RunPlace(new_folder)


def _existing(config: RunConfig, folder: Path) -> RunPlace:
    differences = changed_settings(_read_run(folder), config)
    if differences:
        raise UserError(
            f"{folder}: is a run of other settings:\n  " + "\n  ".join(differences) + "\n"
            "Give the same settings, or start a new run with resume=false. A resumed run may change logger, "
            "logging_steps, save_*, hardware (but its precision), evaluation.at_end, the number of steps, and how a "
            "step's pairs are split up."
        )
    return RunPlace(folder, is_resumed=True, is_finished=(folder / runs.MANIFEST).exists())


def changed_settings(stored: RunConfig, wanted: RunConfig) -> list[str]:
    """`key: stored a, now b` for every setting that a resumed run may not change."""
    lines = runs.differing_fields(dataclasses.asdict(stored), dataclasses.asdict(wanted))
    kept = [line for line in lines if not line.startswith(MAY_CHANGE) or line.startswith("hardware.precision")]
    wanted = _counted_like(stored, wanted)
    if pairs_per_step(stored) != pairs_per_step(wanted):
        kept.append(
            f"pairs per step: stored {_product(stored)}, now {_product(wanted)} (optim.per_device_train_batch_size x "
            "optim.gradient_accumulation_steps x processes; with the first two as stored and without "
            "hardware.processes, the number is kept in any number of processes)"
        )
    return kept


def _product(config: RunConfig) -> str:
    optim = config.optim
    factors = (optim.per_device_train_batch_size, optim.gradient_accumulation_steps, config.hardware.processes)
    return f"{pairs_per_step(config)} = {' x '.join(str(factor) for factor in factors)}"
