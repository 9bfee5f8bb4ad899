"""The files of a checkpoint: where they lie, and whether the weights among them are whole and fit the config."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from laddpo.errors import UserError
from laddpo.models.families import Family
from laddpo.models.foreign import checked, mapped, read_settings, tensor_shapes, text
from laddpo.models.stacked import split_shapes
from laddpo.processes.progress import Progress, is_terminal

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
WEIGHTS = "*.safetensors"
SHARD = re.compile(r"model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")


def checkpoint_folder(path: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """The local folder of a checkpoint: `path` itself when it is one, else the hub's snapshot, cached or downloaded."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    bars = None if is_terminal(sys.stderr) else Progress  # the hub's own says nothing there, for hours
    try:
        files = patterns or SMALL_FILES
        return Path(snapshot_download(path, revision=revision, allow_patterns=files, tqdm_class=bars))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"model.model_name_or_path is {path!r}{at}: no such local folder, and the hub did not give it "
            f"({type(error).__name__}: {reason}). Connect to the network once (it is cached then), log in if the model "
            "is gated, or download it elsewhere and set model.model_name_or_path=<folder with config.json, "
            "tokenizer.json and *.safetensors>."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model: model.safetensors, else its shards. Others in the folder are not read."""
    whole = folder / "model.safetensors"
    shards = (path for path in folder.glob("model-*.safetensors") if SHARD.fullmatch(path.name))
    return [whole] if whole.exists() else sorted(shards)


def require_safetensors(folder: Path) -> None:
    """Raise `UserError` unless the folder's weights are safetensors and all shards of the index are there."""
    files = weight_files(folder)
    if not files:
        pickled = sorted(f.name for p in ("*.bin", "*.pt", "*.pth") for f in folder.glob(p))
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise UserError(
            f"{folder}: holds {found}; expected model.safetensors or its shards. Pickled weights can run code when "
            "opened and are not read: convert them to safetensors, or download the safetensors files."
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = checked(index, read_settings(index), {"weight_map": mapped(text(1000))})
        wanted = set(content.get("weight_map", {}).values())
        missing = sorted(wanted - {f.name for f in files})
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(wanted)} weight shards are missing, first {missing[0]}. "
                "The download was cut off: run it again."
            )


def require_fitting_weights(folder: Path, config, family: Family) -> None:
    """Compare the names and shapes in the files with the config's, before any weight is read. Raises `UserError`."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in family.model_class(config).state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        found |= split_shapes(tensor_shapes(file, "It is damaged or incomplete: get it again."))
    problems = [
        f"{folder}: weights and config.json disagree: {len(names)} tensors {kind} (first: {min(names)}). "
        "Check that all files come from one checkpoint, and that its weights are not quantised."
        for names, kind in (
            (wanted.keys() - found.keys(), "are missing"),
            (found.keys() - wanted.keys(), "are unknown"),
            ({n for n in wanted.keys() & found.keys() if wanted[n] != found[n]}, "have another shape"),
        )
        if names
    ]
    if problems:
        raise UserError(*problems)
