"""Checkpoints of a training run: trainable tensors and optimizer state by name, and the few numbers that are state.

Order of data, noise and learning rate are pure functions of (seed, step), so a checkpoint is three files and a
manifest: `model.safetensors`, `optimizer.safetensors`, `state.json`. A folder is made under a temporary name and
renamed when its manifest is on disk; the newest one whose checksums hold wins. No pickle is read or written.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from laddpo.errors import UserError
from laddpo.processes.ranks import Ranks, placed_like, whole
from laddpo.storage import atomic, locks, manifests
from laddpo.storage.temporaries import move_to, temporary_beside

log = logging.getLogger(__name__)
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is what `save_checkpoint` was given."""

    folder: Path
    step: int
    tensors: dict[str, Tensor]
    optimizer_tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    checkpoints: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
    writes: bool = True,
) -> Path:
    """Write `checkpoints/step_<step>` whole or not at all, then remove all but the newest `keep` (0: keep all).

    `tensors` are the trainable parameters by name. Older checkpoints go only after the new one is in place. With
    sharded weights every rank must call this. Ranks with writes=False write nothing.
    """
    folder = step_folder(checkpoints, step)
    optimizer_tensors, optimizer_numbers = optimizer_state_by_name(optimizer, tensors)
    tensors, optimizer_tensors = whole(tensors, writes), whole(optimizer_tensors, writes)
    if not writes:
        return folder
    with atomic.replaced_folder(folder) as temporary:
        save_tensors(temporary / MODEL, tensors)
        save_tensors(temporary / OPTIMIZER, optimizer_tensors)
        atomic.write_json(temporary / STATE, {**state, "step": step, "optimizer": optimizer_numbers})
        manifests.write_manifest(temporary, "checkpoint", {"step": step}, [MODEL, OPTIMIZER, STATE])
    remove_older(checkpoints, keep)
    return folder


def remove_older(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` (0: none), each under another name: half of one must not look like one."""
    with atomic.explained(checkpoints):
        for folder in step_folders(checkpoints)[keep:] if keep else []:
            with temporary_beside(folder) as doomed:
                move_to(folder, doomed)


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold, or None when there is none at all.

    A damaged one is renamed to `.corrupt-…` and named in a warning; when only damaged ones exist, `UserError`.
    """
    if foreign := sorted(path.name for path in checkpoints.glob("step_*") if step_of(path) is None):
        print(f"note: {checkpoints}: no checkpoints by their names, and ignored: {', '.join(foreign)}.")
    damaged = []
    for folder in step_folders(checkpoints):
        try:
            manifest = manifests.read_manifest(folder, "checkpoint")
            if manifest is None:
                raise UserError(f"{folder}: has no {manifests.MANIFEST}; it is unfinished.")
            if manifest["fields"] != {"step": step_of(folder)} or set(manifest["files"]) != {MODEL, OPTIMIZER, STATE}:
                raise UserError(f"{folder}: its {manifests.MANIFEST} is that of another checkpoint.")
            state = atomic.read_json(folder / STATE)
            return Checkpoint(folder, step_of(folder), load_file(folder / MODEL), load_file(folder / OPTIMIZER), state)
        except UserError as error:
            damaged.append(quarantine(folder))
            log.warning("checkpoint %s is damaged and set aside as %s: %s", folder.name, damaged[-1].name, error)
    if damaged:
        raise UserError(
            f"{checkpoints}: every checkpoint is damaged ({', '.join(d.name for d in damaged)}). "
            "Start again with resume=false and another output_dir, or restore a checkpoint from a backup."
        )
    return None


def newest_of_main(checkpoints: Path, ranks: Ranks) -> Checkpoint | None:
    """Rank 0's newest checkpoint, on every rank: one reads, so that none finds another, or sets one aside twice."""
    found = newest_checkpoint(checkpoints) if ranks.is_main else None
    if ranks.world == 1:
        return found
    head = ranks.broadcast(None if found is None else [str(found.folder), found.step, found.state])
    if head is None:
        return None
    tensors, moments = (
        ranks.broadcast_tensors(None if found is None else part)
        for part in ((found.tensors, found.optimizer_tensors) if found else (None, None))
    )
    return Checkpoint(Path(head[0]), head[1], tensors, moments, head[2])


def restore(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint into the model's trainable parameters and the optimizer, matching both by name."""
    stored, wanted = ({name: tuple(t.shape) for name, t in ts.items()} for ts in (checkpoint.tensors, tensors))
    differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{checkpoint.folder}: its trainable parameters differ from the model's, for example {name}: stored "
            f"{stored.get(name, 'absent')}, now {wanted.get(name, 'absent')}. "
            "Resume with the adapter settings of the run that wrote it."
        )
    for name, tensor in tensors.items():
        tensor.data.copy_(placed_like(tensor, checkpoint.tensors[name]))
    numbers = checkpoint.state["optimizer"]
    for name, parameter in tensors.items():
        prefix = f"{name}/"
        state: dict[str, Any] = dict(numbers.get(name, {}))
        for key, value in checkpoint.optimizer_tensors.items():
            if key.startswith(prefix):
                # torch's AdamW keeps its step counter as a tensor on the CPU; moments live where the parameter does
                field = key[len(prefix) :]
                state[field] = value if field == "step" else placed_like(parameter, value)
        if state:
            optimizer.state[parameter] = state


def step_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first; unfinished and quarantined ones have other names, and so do a user's copies."""
    folders = [folder for folder in checkpoints.glob("step_*") if step_of(folder) is not None]
    return sorted(folders, key=step_of, reverse=True)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of this step lies, or will."""
    return checkpoints / f"step_{step:07d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None when it is no name of a checkpoint."""
    number = re.fullmatch(r"step_([0-9]+)", folder.name)
    return int(number[1]) if number else None


def quarantine(folder: Path) -> Path:
    """Set a damaged folder aside under a name that nothing reads."""
    for number in range(1000):
        target = folder.with_name(f".corrupt-{folder.name}-{number}")
        if not target.exists():
            os.replace(folder, target)
            return target
    raise UserError(f"{folder}: a thousand damaged copies lie beside it; remove them.")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Safetensors of detached copies (several names may share memory, which the format refuses), made durable."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(copies, path)
    except SafetensorError as error:  # what its compiled writer makes of a full disk
        raise UserError(locks.disk_message(path, OSError(str(error)))) from error
    atomic.sync_file(path)


def optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Moments as `parameter name/field` and plain numbers as {name: {field: value}}.

    By name and not by position: state saved in the order of a dict is scrambled by a second resume.
    """
    arrays: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in tensors.items():
        for field, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                arrays[f"{name}/{field}"] = value
            else:
                numbers.setdefault(name, {})[field] = value
    return arrays, numbers
