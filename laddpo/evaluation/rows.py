"""Rows of evaluation tasks: from a local .jsonl, or from a hub data set; each checked, a bad one named by its line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.preference.badrows import BadRow
from laddpo.preference.files import ReadLog, read_rows

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
    placed = read_jsonl(path) if path else list(_placed(source, hub_rows(source, subset, split, revision)))
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
    """The file that `source` names as given or inside the benchmarks folder; None when it can only be a hub id."""
    candidates = [Path(source).expanduser()]
    if benchmarks_dir is not None:
        candidates += [benchmarks_dir / source, benchmarks_dir / f"{source}.jsonl"]
    for path in candidates:
        if path.is_file():
            return path
    if source.endswith((".jsonl", ".json")):
        raise UserError(f"evaluation.dataset_name: no file {' or '.join(map(str, candidates))}. Correct the path.")
    return None


def read_jsonl(path: Path) -> list[tuple[str, dict]]:
    """(file:line, row) of every line that is not blank; `UserError` names the first that is no object."""
    placed = []
    for found in read_rows([path], MAX_LINE_BYTES, ReadLog(), kind="jsonl"):
        if isinstance(found, BadRow):
            raise UserError(str(found))
        placed.append(found)
    return placed


def hub_rows(source: str, subset: str | None, split: str, revision: str | None) -> list[dict]:
    """All rows of a hub data set, from its cache where they are there."""
    try:
        from datasets import load_dataset

        return list(load_dataset(source, subset, split=split, revision=revision))
    except Exception as error:  # the library raises a dozen kinds, for no network, no such name and no such split alike
        raise UserError(
            f"{source} (split {split}) could not be had from the hub or its cache: {type(error).__name__}: {error}. "
            f"Download it once with network, or point evaluation.dataset_name at a local .jsonl with the same fields."
        ) from error
