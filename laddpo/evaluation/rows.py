"""Rows of evaluation tasks: from a local .jsonl, or from a hub data set; each checked, a bad one named by its line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laddpo.errors import UserError

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
    numbered = read_jsonl(path) if path else list(enumerate(hub_rows(source, subset, split, revision), 1))
    for number, row in numbered:
        for key, expected, is_expected in fields:
            if not is_expected(row.get(key)):
                raise UserError(
                    f"{path or source}:{number}: field {key!r} is {str(row.get(key))[-60:]!r}, expected {expected}. "
                    f"Mend or remove the row, or name another file in evaluation.dataset_name."
                )
    return [row for _, row in numbered]


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


def read_jsonl(path: Path) -> list[tuple[int, dict]]:
    """(line number, row) of every line that is not blank."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not JSON ({error}). Expected one object per line; mend the line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: is {line[:40]!r}, expected an object with the task's fields.")
        rows.append((number, row))
    return rows


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
