"""Finds what `data.dataset_name` means: local files (one, a pattern, a folder) or a dataset of the hub."""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path

from laddpo.errors import UserError, nearest
from laddpo.preference.badrows import file_error
from laddpo.preference.files import PACKED_SUFFIXES, SUFFIXES, ReadLog, missing_file

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(dataset_name: str, preference_dir: Path | None, log: ReadLog, follow_symlinks: bool = False) -> list[Path]:
    """The local files that the name means, sorted; an empty list when it can only be a hub id.

    A relative name is looked up from the working directory, then inside `preference_dir`.
    """
    refuse_strange(dataset_name)
    try:
        return _locate(dataset_name, preference_dir, log, follow_symlinks)
    except OSError as error:  # of looking, not of reading: a folder without permission, a name too long for the disk
        where = error.filename or dataset_name
        raise file_error(
            where, "DATA-43", f"could not be looked at: {error.strerror}", "Check data.dataset_name."
        ) from error


def _locate(dataset_name: str, preference_dir: Path | None, log: ReadLog, follow_symlinks: bool) -> list[Path]:
    candidates = [Path(dataset_name)]
    if preference_dir is not None and not Path(dataset_name).is_absolute():
        candidates.append(preference_dir / dataset_name)
    for path in candidates:
        if path.is_dir():
            return folder_files(path, log, follow_symlinks)
        if os.path.lexists(path):
            return [path]
        is_pattern = re.search(r"[*?\[]", path.name) and path.parent.is_dir()
        if is_pattern and (matches := sorted(p for p in path.parent.glob(path.name) if p.is_file())):
            return matches
    if HUB_ID.fullmatch(dataset_name) and not has_file_name(dataset_name):
        return []
    if re.search(r"[*?\[]", dataset_name):
        raise file_error(dataset_name, "DATA-41", f"matches no file from {Path.cwd()}", "Check data.dataset_name.")
    where = [path for path in candidates if path.parent.is_dir()]
    guesses = [(path, nearest(path.name, [p.name for p in path.parent.iterdir()])) for path in where]
    best = next((path for path, guess in guesses if guess), candidates[0])
    raise missing_file(best)


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
        if not is_folder and not has_file_name(path.name):
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
            if not entry.name.startswith("."):
                (rest.append if entry.is_symlink() else rest.appendleft)(entry)  # links last
    if ignored:
        names = ", ".join(sorted(ignored)[:10])
        log.warn(f"{folder}: files not read, their kind is unknown: {names}", len(ignored))
    if not files:
        known = ", ".join(sorted(SUFFIXES))
        raise file_error(folder, "DATA-39", f"is a folder without data files ({known})", "Put the rows there.")
    return sorted(files)


def has_file_name(name: str) -> bool:
    """Whether a name ends like a data file, packed or not."""
    path = Path(name)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in SUFFIXES


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
