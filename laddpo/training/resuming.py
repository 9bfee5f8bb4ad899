"""Which folder a training run writes to, and whether it continues a stopped one.

`resume` is false (a new run), true (output_dir, else the newest unfinished run with which the command line agrees) or a
run's folder. A resumed run takes the settings of its folder: only what the command line names is compared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from laddpo.errors import Stopped, UserError, visible
from laddpo.processes.ranks import here, launched
from laddpo.settings.checks import EPOCHS, find_problems
from laddpo.settings.compose import plain_settings, read_config
from laddpo.settings.of_a_run import override_key, read_command
from laddpo.settings.ranges import leaves
from laddpo.settings.redaction import redact
from laddpo.settings.schema import RunConfig
from laddpo.storage import manifests
from laddpo.storage.folders import owned

# What a resumed run may change: where it runs, how it reports, how often it saves, and how long it trains. What is
# recommended for a model is where other settings take their values from: those are compared. Of a step's pairs the
# number is compared and not its factors, which change no value. Where the base lies may change: its weights are pinned.
MAY_DIFFER = (
    "output_dir", "resume", "auto", "verify", "run", "runs", "dry_run", "logging_steps", "save_", "logger.", "paths.",
    "model.recommended.", "model.model_name_or_path", "model.revision", "hardware.", "evaluation.at_end",
    "optim.max_train_steps", "optim.num_train_epochs", "optim.per_device_train_batch_size",
    "optim.gradient_accumulation_steps",
)  # fmt: skip
OWN = ("output_dir", "resume", "hydra")  # keys that say where, and nothing of the run
WHERE = ("model.model_name_or_path", "model.revision")  # by which a search tells runs of one model from another's
GROUPS_THAT_MAY_DIFFER = ("hardware", "logger", "paths")
PLACES = ("adapter.path", "model.model_name_or_path", "data.dataset_name", "run")
_ABSENT = object()


@dataclass(frozen=True)
class Asked:
    """A command line: its settings as composed, its overrides, and what composes the same line without some of them."""

    config: RunConfig
    overrides: tuple[str, ...]
    compose_without: Callable[[Sequence[str]], RunConfig]

    def names(self, override: str) -> list[str]:
        """The settings that an override names: one, or all of a group; none of an experiment, which may set any.
        Epochs stand in place of a number of steps."""
        key = f"{override_key(override)}."
        steps = ["optim.max_train_steps"] if override_key(override) in EPOCHS else []
        names = [name for name, _ in leaves(self.config) if f"{name}.".startswith(key) or key.startswith(f"{name}.")]
        return steps + names


@dataclass(frozen=True)
class RunPlace:
    """Where a run writes; `is_resumed`: an earlier part of it is there; `is_finished`: nothing is left to do."""

    folder: Path
    is_resumed: bool = False
    is_finished: bool = False


def find_run(config: RunConfig, new_folder: Path) -> RunPlace:
    """Where the run writes. If it continues, `resume` already names a folder. Rank 0 looks for all processes."""
    ranks = here()
    if config.resume in ("true", "false"):
        return RunPlace(new_folder)
    folder = Path(config.resume)
    is_finished = ranks.broadcast((folder / manifests.MANIFEST).exists() if ranks.is_main else None)
    return RunPlace(folder, is_resumed=True, is_finished=is_finished)


def check_finished(config: RunConfig, folder: Path, kind: str) -> None:
    """Say that nothing is left to do, once the run is found whole and no more than it did is asked for."""
    from laddpo.inputs.tuned import tuned_weights

    manifests.read_manifest(folder, kind)
    refuse_longer_training(config, folder)
    tuned_weights(config.adapter, folder)
    print(f"{folder}: this run is finished; nothing was changed.")


def refuse_longer_training(config: RunConfig, folder: Path) -> None:
    """A finished run's learning rate has come down; more steps are a new run that starts from its weights."""
    from laddpo.inputs.policy import ADAPTER, MODEL

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
        stored = _read_run(place.folder)
        # config.yaml keeps the word that the run began with, so that it is the same file after any resume
        return dataclasses.replace(_counted_like(stored, config), resume=stored.resume)
    return _counted_for(config, config.hardware.processes or here().world)


def _counted_like(stored: RunConfig, wanted: RunConfig) -> RunConfig:
    """`wanted` with the processes that its steps are counted for: as set; else those that the run began with, or, where
    a process is given other pairs than it had, those launched."""
    from laddpo.hardware.planning import pairs_per_process

    is_same_share = pairs_per_process(stored.optim) == pairs_per_process(wanted.optim)
    began_with = stored.hardware.processes if is_same_share else here().world
    return _counted_for(wanted, wanted.hardware.processes or began_with)


def _read_run(folder: Path) -> RunConfig:
    """The settings of the run in `folder`; where it says nothing of processes it began in one."""
    stored = read_config(folder)
    return _counted_for(stored, stored.hardware.processes or 1)


def _counted_for(config: RunConfig, processes: int) -> RunConfig:
    return dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, processes=processes))


@contextlib.contextmanager
def held(folder: Path, kind: str, is_resumed: bool = False) -> Iterator[None]:
    """Hold a run's folder for this run; with several processes rank 0 does, for all.

    What was decided about the folder before it was held is decided again: another process may have written meanwhile.
    """
    if not here().is_main:
        yield
        return
    with owned(folder, kind, is_resumed, "the run's folder" if is_resumed else "output_dir") as found:
        if found.is_finished and kind in ("train", "sft"):
            raise UserError(f"{folder}: another process finished this run meanwhile. Nothing was changed.")
        yield


@contextlib.contextmanager
def told_to_resume(folder: Path, way: str | None = None) -> Iterator[None]:
    """A stop inside the block says how to continue in `folder`, if that is a run by then: by `resume=`, or by `way` if
    there are no steps."""
    try:
        yield
    except Stopped as stopped:
        if not (folder / "config.yaml").exists():
            raise
        from laddpo.storage.checkpoint import step_folders
        from laddpo.storage.run_outputs import round_folders

        has_steps = any(step_folders(place / "checkpoints") for place in (folder, *round_folders(folder)))
        again = "" if way or has_steps else " It has no checkpoint yet and starts at step 0 again."
        cure = f"Continue with the same command and {way or f'resume={folder}'}.{again}"
        raise Stopped(stopped.found, cure) from None


def resumed_settings(asked: Asked, stage: str) -> RunConfig | None:
    """The settings of the run that is resumed, with `resume` as its folder; None if there is no run to resume.

    Raises `UserError` listing what the command line names otherwise than the run has it.
    """
    config = asked.config
    if config.resume == "false":
        return None
    given = None if config.output_dir is None else Path(config.output_dir)
    if config.resume != "true":
        folder = Path(config.resume)
        if not (folder / "config.yaml").exists():
            raise UserError(f"resume is {config.resume!r}, which holds no run (no config.yaml); check the path.")
        if given is not None and given.resolve() != folder.resolve():
            raise UserError(
                f"resume is {config.resume!r} and output_dir is {config.output_dir!r}; expected one folder. A run goes "
                "on in its own; leave output_dir out."
            )
        return _existing(asked, folder)
    if given is not None:
        if (given / "config.yaml").exists():
            return _existing(asked, given)
        _say(f"resume=true, but {given} holds no run yet; starting a new one there.")
        return None
    earlier = Path(config.paths.outputs_dir) / stage
    for folder in _newest_unfinished(asked, earlier):
        try:
            stored = _read_run(folder)
        except UserError as error:
            _say(visible(f"note: resume=true: passing over an unfinished run. {error}"))
            continue
        merged, differences = _merge(asked, folder, stored, WHERE)
        if not differences:
            _say(f"resume=true: going on with {folder}")
            return _checked(merged, stored)
    _say(f"resume=true, but {earlier} has no unfinished run of these settings; starting a new one.")
    return None


def _say(text: str) -> None:
    if launched().is_main:
        print(text)


def _newest_unfinished(asked: Asked, earlier: Path) -> Iterator[Path]:
    """Unfinished runs, newest first, but for those whose config.yaml, read as plain data, already says otherwise.

    Reading settings with their types takes thirty times as long.
    """
    named = {name for text in asked.overrides for name in asked.names(text) if name == override_key(text)}
    wanted = {name: value for name, value in leaves(asked.config) if name in named and not may_change(name, WHERE)}
    wanted = {name: value for name, value in wanted.items() if isinstance(value, str | int | float | bool)}
    found = {}
    for path in earlier.glob("*/config.yaml"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found[path] = path.stat().st_mtime_ns
    for path in sorted(found, key=lambda path: found[path], reverse=True):
        if (path.parent / manifests.MANIFEST).exists() or _differs(path, wanted):
            continue
        yield path.parent


def _differs(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a plain value in this file is another one. What cannot be read or is not there decides nothing."""
    try:
        tree = plain_settings(path)
    except (yaml.YAMLError, OSError, ValueError):
        return False
    for name, value in wanted.items():
        found = tree
        for key in name.split("."):
            found = found.get(key, _ABSENT) if isinstance(found, dict) else _ABSENT
        if isinstance(found, str | int | float | bool | None) and not _is_same(name, found, value):
            return True
    return False


def _existing(asked: Asked, folder: Path) -> RunConfig:
    stored = _read_run(folder)
    merged, differences = _merge(asked, folder, stored)
    if differences:
        raise UserError(
            f"{folder}: is a run of other settings:\n  " + "\n  ".join(differences) + "\n"
            "Leave them out: a resumed run takes its folder's settings. Or start a new run with resume=false. "
            "A resumed run may change logger, logging_steps, save_*, hardware (but its precision), evaluation.at_end, "
            "the place of its base model, the number of steps, and how a step's pairs are split up."
        )
    return _checked(merged, stored)


def _checked(merged: RunConfig, stored: RunConfig) -> RunConfig:
    """The settings, if nothing in them contradicts the rest. What the run had from its beginning is no problem."""
    known = find_problems(stored)
    if problems := [problem for problem in find_problems(merged) if problem not in known]:
        raise UserError(*problems)
    return merged


def _merge(asked: Asked, folder: Path, stored: RunConfig, fixed: tuple[str, ...] = ()) -> tuple[RunConfig, list[str]]:
    """The run's settings with what the command line may change, and `key: stored a, now b` for what it may not, which
    `fixed` adds to."""
    from laddpo.hardware.planning import pairs_per_step  # with numpy, which a job that only begins need not wait for

    has, wanted = dict(leaves(stored)), dict(leaves(asked.config))
    merged = copy.deepcopy(stored)
    merged.hardware.processes = asked.config.hardware.processes
    differences = []
    for name in _named(asked, folder, has, wanted):
        if _is_same(name, has[name], wanted[name]):
            continue
        if may_change(name, fixed):
            *groups, last = name.split(".")
            setattr(operator.attrgetter(".".join(groups))(merged) if groups else merged, last, wanted[name])
        else:
            differences += manifests.differing_fields({name: _plain(has[name])}, {name: _plain(wanted[name])})
    merged.resume = str(folder)
    counted = _counted_like(stored, merged)
    if pairs_per_step(stored.optim, stored.hardware) != pairs_per_step(counted.optim, counted.hardware):
        differences.append(
            f"pairs per step: stored {_product(stored)}, now {_product(counted)} (optim.per_device_train_batch_size x "
            "optim.gradient_accumulation_steps x processes; with the first two as stored and without "
            "hardware.processes, the number is kept in any number of processes)"
        )
    return merged, differences


def _named(asked: Asked, folder: Path, has: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings that the command line names: by their keys, by a group, or because others take their values from
    what it names. A group that is chosen as when the run began has not changed, whatever its file says now."""
    begun = set(read_command(folder).get("overrides", ()))
    named: set[str] = set()
    others = []
    for override in asked.overrides:
        key, names = override_key(override), asked.names(override)
        is_kept = key not in names and key not in GROUPS_THAT_MAY_DIFFER and redact(override) in begun
        if key.split(".")[0] in OWN or is_kept:
            continue
        named.update(names)
        if not names or any(not _is_same(name, has[name], wanted[name]) for name in names):
            others.append(override)
    if others:
        without = dict(leaves(asked.compose_without([text for text in asked.overrides if text not in others])))
        named.update(name for name, value in wanted.items() if value != without[name])
    return sorted(name for name in named if name.split(".")[0] not in OWN and not name.startswith("model.recommended."))


def may_change(name: str, fixed: tuple[str, ...] = ()) -> bool:
    """Whether a resumed run may have another value of this setting."""
    return name.startswith(MAY_DIFFER) and not name.startswith(("hardware.precision", *fixed))


def _is_same(name: str, stored: Any, wanted: Any) -> bool:
    is_place = name in PLACES and isinstance(stored, str) and isinstance(wanted, str)
    return _plain(stored) == _plain(wanted) or (is_place and os.path.realpath(stored) == os.path.realpath(wanted))


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _product(config: RunConfig) -> str:
    from laddpo.hardware.planning import pairs_per_step

    optim = config.optim
    factors = (optim.per_device_train_batch_size, optim.gradient_accumulation_steps, config.hardware.processes)
    return f"{pairs_per_step(config.optim, config.hardware)} = {' x '.join(str(factor) for factor in factors)}"
