"""Finds what `data.dataset_name` means: local files (one, a pattern, a folder) or a dataset of the hub."""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path

from laddpo.errors import UserError, nearest
from laddpo.preference.reading.bad_rows import file_error, printable
from laddpo.preference.reading.files import ReadLog, missing_file
from laddpo.preference.reading.splits import (
    DESCRIPTIONS,
    HUB_ID,
    SHARD,
    SUFFIXES,
    check_shards,
    choose_files,
    contradicted_split,
    described_splits,
    has_file_name,
    splits_by_name,
)


def locate(
    dataset_name: str,
    preference_dir: Path | None,
    log: ReadLog,
    follow_symlinks: bool = False,
    split: str | None = None,
    config: str | None = None,
) -> list[Path]:
    """The local files that the name means, in order; an empty list when it can only be a hub id.

    A relative name is looked up from the working directory, then inside `preference_dir`. For a folder, and for a
    pattern whose files belong to several splits, only the files of `split` are read, and `log` lists the others. A file
    given by its own name is read whatever split that names.
    """
    refuse_strange(dataset_name)
    try:
        path, files = _find(dataset_name, preference_dir, log, follow_symlinks)
        if path is None:
            return []
        if path.is_dir():
            files, unread = choose_files(path, files, split, config)
            log.unread.update({printable(path): split for path, split in unread.items()})
            return files
        if config is not None:  # of a yaml file: one that the user gave is refused before
            log.warn(f"{dataset_name}: data.dataset_config={config} is not used, files have no configurations")
        return _matched_files(path, files, split, log) if path not in files else _one_file(path, split, log)
    except OSError as error:  # of looking, not of reading: a folder without permission, a name too long for the disk
        where = error.filename or dataset_name
        raise file_error(
            where, "DATA-43", f"could not be looked at: {error.strerror}", "Check data.dataset_name."
        ) from error


def has_split(
    dataset_name: str, preference_dir: Path | None, follow_symlinks: bool, split: str, config: str | None
) -> bool:
    """Whether a folder, or a pattern, has files of this split beside others. A hub id may have it: true."""
    path, files = _find(dataset_name, preference_dir, ReadLog(), follow_symlinks)
    if path is None or path in files:
        return path is None
    root = path if path.is_dir() else path.parent
    splits = (described_splits(root, files, config) if path.is_dir() else {}) or splits_by_name(root, files)
    return split in splits and len(splits) > 1


def _find(
    dataset_name: str, preference_dir: Path | None, log: ReadLog, follow_symlinks: bool
) -> tuple[Path | None, list[Path]]:
    """The folder, file or pattern that the name means, with its data files; None for what can only be a hub id."""
    candidates = [Path(dataset_name)]
    if preference_dir is not None and not Path(dataset_name).is_absolute():
        candidates.append(preference_dir / dataset_name)
    for path in candidates:
        if path.is_dir():
            return path, folder_files(path, log, follow_symlinks)
        if path.is_symlink() and not path.exists():
            raise missing_file(path)
        if os.path.lexists(path):
            return path, [path]
        is_pattern = re.search(r"[*?\[]", path.name) and path.parent.is_dir()
        if is_pattern and (matches := sorted(p for p in path.parent.glob(path.name) if p.is_file())):
            return path, matches
    if HUB_ID.fullmatch(dataset_name) and not has_file_name(dataset_name):
        return None, []
    if re.search(r"[*?\[]", dataset_name):
        raise file_error(dataset_name, "DATA-41", f"matches no file from {Path.cwd()}", "Check data.dataset_name.")
    where = [path for path in candidates if path.parent.is_dir()]
    guesses = [(path, nearest(path.name, [p.name for p in path.parent.iterdir()])) for path in where]
    best = next((path for path, guess in guesses if guess), candidates[0])
    raise missing_file(best)


def _one_file(path: Path, split: str | None, log: ReadLog) -> list[Path]:
    """A file given by its own name, with notes about what the name says."""
    shard = SHARD.fullmatch(path.name)
    if shard and int(shard["total"]) > 1:
        log.warn(f"{path}: is one of {int(shard['total'])} parts; only this file is read, since it was given by name")
    if split and (problem := contradicted_split(path.name, split)) and problem.startswith("its name"):
        log.warn(f"{path}: {problem}; it is read since it was given by name, data.dataset_split={split} is not used")
    return [path]


def _matched_files(pattern: Path, files: list[Path], split: str | None, log: ReadLog) -> list[Path]:
    """The files of a pattern: all when they are of one split, else those of the split that was asked for."""
    splits = splits_by_name(pattern.parent, files)
    if len(splits) == 1 and len(next(iter(splits.values()))) == len(files):
        check_shards(files, [path for path in pattern.parent.iterdir() if has_file_name(path.name)])
        return files
    files, unread = choose_files(pattern.parent, files, split)
    log.unread.update({printable(path): split for path, split in unread.items()})
    return files


def folder_files(folder: Path, log: ReadLog, follow_symlinks: bool) -> list[Path]:
    """The data files under a folder, sorted by name and each once; other files are named once, hidden ones left out.

    Links out of it, to files and to folders, are refused unless they are to be followed.
    """
    root = folder.resolve()
    files: list[Path] = []
    ignored: list[str] = []
    seen: set[Path] = set()
    rest = deque([folder])
    while rest:
        path = rest.popleft()
        is_folder = path.is_dir()
        if not is_folder and (not has_file_name(path.name) or path.name in DESCRIPTIONS):
            ignored.append(path.name)
            continue
        if not path.exists():
            raise missing_file(path)
        place = path.resolve()
        if place in seen:  # a link to what was read where it lies, or one of a circle
            continue
        seen.add(place)
        if place == Path(place.anchor):
            raise file_error(path, "DATA-91", "is the root of the file system", "Give the folder that holds the rows.")
        if not follow_symlinks and not place.is_relative_to(root):
            advice = "Give its target as data.dataset_name, or set data.follow_symlinks=true."
            raise file_error(path, "DATA-44", f"is a link out of the folder, to {place}", advice)
        if not is_folder:
            files.append(path)
            continue
        for entry in sorted(path.iterdir(), reverse=True):
            if not entry.name.startswith(".") and not (entry.name.startswith("__") and entry.is_dir()):
                (rest.append if entry.is_symlink() else rest.appendleft)(entry)  # links last
    if ignored:
        names = ", ".join(sorted(ignored)[:10])
        log.warn(f"{folder}: files not read, they hold no rows or their kind is unknown: {names}", len(ignored))
    if not files:
        known = ", ".join(sorted(SUFFIXES))
        raise file_error(folder, "DATA-39", f"is a folder without data files ({known})", "Put the rows there.")
    return sorted(files)


def refuse_strange(dataset_name: str) -> None:
    """Names that no shell and no reader would agree about."""
    if not dataset_name.strip():
        raise UserError("data.dataset_name is empty (DATA-91). Give a local path or a hub id such as org/name.")
    for pattern, problem in STRANGE.items():
        if re.search(pattern, dataset_name):
            raise UserError(
                f"data.dataset_name is {dataset_name!r}: {problem} (DATA-91). Give a plain path, or a hub id "
                f"such as org/name."
            )


STRANGE = {
    r"[\x00\n\r]": "it contains a line end or NUL",
    r"^[A-Za-z][A-Za-z0-9+.-]*://": "addresses are not read",
    r"^~": "~ is not expanded here",
    r"\$": "variables are not expanded here",
}
