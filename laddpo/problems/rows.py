"""Rows of evaluation tasks: from a local .jsonl, or from a hub data set; each checked, a bad one named by its line."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog, missing_file, read_rows
from laddpo.preference.reading.locate import folder_files
from laddpo.preference.reading.splits import choose_files, has_configurations
from laddpo.preference.report import unread_lines
from laddpo.processes.progress import quiet_datasets
from laddpo.processes.ranks import here

MAX_LINE_BYTES = 16 * 2**20
SURROGATE = re.compile("[\ud800-\udfff]")
Field = tuple[str, str, Callable[[Any], bool]]  # name, what is expected in words, whether a value is that


def task_rows(
    source: str,
    subset: str | None,
    split: str,
    revision: str | None,
    benchmarks_dir: Path | None,
    fields: tuple[Field, ...],
) -> list[dict[str, Any]]:
    """Rows whose `fields` hold what is expected; `UserError` names the file, the line and the field otherwise."""
    path = local_file(source, benchmarks_dir)
    if path is None:
        placed = list(_placed(source, hub_rows(source, subset, split, revision)))
    elif path.is_dir():
        placed = _listed(read_rows(folder_split(path, subset, split), MAX_LINE_BYTES, ReadLog()))
    else:
        placed = read_jsonl(path)
    for place, row in placed:
        _check_encodable(place, row)
        for key, expected, is_expected in fields:
            if not is_expected(row.get(key)):
                raise UserError(
                    f"{place}: field {key!r} is {str(row.get(key))[-60:]!r}, expected {expected}. "
                    f"Mend or remove the row, or name another file in evaluation.dataset_name."
                )
    return [row for _, row in placed]


def _placed(source: str, rows: list[dict]) -> Iterator[tuple[str, dict]]:
    return ((f"{source}:{number}", row) for number, row in enumerate(rows, 1))


def _check_encodable(place: str, row: dict[str, Any]) -> None:
    """Refuse half of a surrogate pair, which JSON may hold and no tokenizer takes."""
    for key, value in row.items():
        if half := SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str)):
            raise UserError(
                f"{place}: field {key!r} has half of a surrogate pair, {half.group()!a}, expected whole characters. "
                "Write the whole pair, or the character itself."
            )


def matches(pattern: str) -> Callable[[Any], bool]:
    """Whether a value is a text in which the pattern is found."""
    return lambda value: isinstance(value, str) and re.search(pattern, value) is not None


def is_choices(value: Any) -> bool:
    """Whether a value lists choices as ARC does."""
    lists = [value.get(key) for key in ("text", "label")] if isinstance(value, dict) else [None]
    return all(isinstance(found, list) and found for found in lists) and len({len(found) for found in lists}) == 1


def local_file(source: str, benchmarks_dir: Path | None) -> Path | None:
    """The file or folder that `source` names as given or inside the benchmarks folder; None when it can only be a hub
    id."""
    candidates = [Path(os.path.expanduser(source))]
    if benchmarks_dir is not None:
        candidates += [benchmarks_dir / source, benchmarks_dir / f"{source}.jsonl"]
    for path in candidates:
        with _looked_at(path):
            if path.is_file() or path.is_dir():
                return path
            if path.is_symlink():
                raise missing_file(path, "evaluation.dataset_name")
    if source.endswith((".jsonl", ".json")):
        raise UserError(f"evaluation.dataset_name: no file {' or '.join(map(str, candidates))}. Correct the path.")
    return None


@contextmanager
def _looked_at(path: Path) -> Iterator[None]:
    """Turns what makes a path unreadable into a UserError: a folder without permission, a name that is too long."""
    try:
        yield
    except (OSError, ValueError) as error:
        found = getattr(error, "filename", None) or path
        raise UserError(
            f"evaluation.dataset_name: {found} could not be looked at: {getattr(error, 'strerror', error)} (DATA-43). "
            "Correct the path, or its permissions."
        ) from error


def folder_split(folder: Path, subset: str | None, split: str) -> list[Path]:
    """The files of a split of a local data set, in its part `subset` where it has one; the others are listed."""
    log = ReadLog()
    with _looked_at(folder):
        config = subset if subset and has_configurations(folder) else None
        if subset and config is None and (folder / subset).is_dir():
            folder = folder / subset
        files = folder_files(folder, log, follow_symlinks=False)
        chosen, unread = choose_files(folder, files, split, config, key="evaluation.dataset_name: the split")
    if here().is_main:
        for line in [*log.warnings, *unread_lines(unread)]:
            print(f"note: {line.strip()}", file=sys.stderr)
    return chosen


def read_jsonl(path: Path) -> list[tuple[str, dict]]:
    """(file:line, row) of every line that is not blank; `UserError` names the first that is no object."""
    return _listed(read_rows([path], MAX_LINE_BYTES, ReadLog(), kind="jsonl"))


def _listed(rows: Iterator[tuple[str, dict] | BadRow]) -> list[tuple[str, dict]]:
    placed = []
    for found in rows:
        if isinstance(found, BadRow):
            raise UserError(str(found))
        placed.append(found)
    return placed


def hub_rows(source: str, subset: str | None, split: str, revision: str | None) -> list[dict]:
    """All rows of a hub data set, from its cache where they are there."""
    try:
        from datasets import load_dataset

        quiet_datasets()
        return list(load_dataset(source, subset, split=split, revision=revision))
    except Exception as error:  # the library raises a dozen kinds, for no network, no such name and no such split alike
        raise UserError(
            f"{source} (split {split}) could not be had from the hub or its cache: {type(error).__name__}: {error}. "
            f"Download it once with network, or point evaluation.dataset_name at a local .jsonl with the same fields."
        ) from error
