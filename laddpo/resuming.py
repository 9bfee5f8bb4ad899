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
from laddpo.errors import UserError
from laddpo.settings import RunConfig

# What a resumed run may change: where it runs, how it reports, how often it saves, and how long it trains. What is
# recommended for a model is where other settings take their values from: those are compared.
MAY_CHANGE = (
    "output_dir", "resume", "auto", "verify", "run", "runs", "dry_run", "logging_steps", "save_", "logger.", "paths.",
    "model.recommended.", "hardware.", "evaluation.at_end", "optim.max_train_steps", "optim.num_train_epochs",
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


def step_processes(config: RunConfig, place: RunPlace) -> RunConfig:
    """The settings with the number of processes that a step's pairs are counted for: a resumed run's stays what it was,
    so that each step has the pairs it would have had, in any number of processes."""
    processes = config.hardware.processes or here().world
    if place.is_resumed:
        processes = read_config(place.folder).hardware.processes or 1
    return dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, processes=processes))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this run; of several processes rank 0 does, for all."""
    if not here().is_main:
        yield
        return
    with runs.locked(folder, wait=False):
        yield


def _find_run(config: RunConfig, new_folder: Path, stage: str) -> RunPlace:
    if config.resume == "false":
        return RunPlace(new_folder)
    if config.resume != "true":
        folder = Path(config.resume)
        if not (folder / "config.yaml").exists():
            raise UserError(f"resume is {config.resume!r}, which holds no run (no config.yaml); check the path.")
        return _existing(config, folder, stage)
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        if (folder / "config.yaml").exists():
            return _existing(config, folder, stage)
        print(f"resume=true, but {folder} holds no run yet; starting a new one there.")
        return RunPlace(folder)
    earlier = Path(config.paths.outputs_dir) / stage
    for config_file in sorted(earlier.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        folder = config_file.parent
        if not (folder / runs.MANIFEST).exists() and not changed_settings(read_config(folder), config):
            print(f"resume=true: going on with {folder}")
            return RunPlace(folder, is_resumed=True)
    print(f"resume=true, but {earlier} has no unfinished run of these settings; starting a new one.")
    return RunPlace(new_folder)


def _existing(config: RunConfig, folder: Path, stage: str) -> RunPlace:
    differences = changed_settings(read_config(folder), config)
    if differences:
        raise UserError(
            f"{folder}: is a run of other settings:\n  " + "\n  ".join(differences) + "\n"
            "Give the same settings, or start a new run with resume=false. A resumed run may change logger, "
            "logging_steps, save_*, hardware (but its precision), evaluation.at_end and the number of steps."
        )
    return RunPlace(folder, is_resumed=True, is_finished=(folder / runs.MANIFEST).exists())


def changed_settings(stored: RunConfig, wanted: RunConfig) -> list[str]:
    """`key: stored a, now b` for every setting that a resumed run may not change."""
    lines = runs.differing_fields(dataclasses.asdict(stored), dataclasses.asdict(wanted))
    return [line for line in lines if not line.startswith(MAY_CHANGE) or line.startswith("hardware.precision")]
