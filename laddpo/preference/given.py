"""Preference rows that a caller of the package gives: read and encoded in their order, or written into a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.preference.encoding.encode import EncodedPair, TextEncoder
from laddpo.preference.reading.bad_rows import BadRow, BadRows, RowError
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import PreferencePair, RowIds
from laddpo.preference.sources import Request, read_pairs
from laddpo.storage.atomic import write_text

CURE = "Give dictionaries with prompt, chosen and rejected; of a DataFrame, frame.to_dict('records')."
LISTED = 20  # problems shown in an error message


def encoded_pairs(
    pairs: str | Path | Iterable[Any], columns: Mapping[str, str], encoder: TextEncoder
) -> list[EncodedPair]:
    """The pairs of a file or of rows, in their order, with the ids that `prepare` gives them. `UserError` names the
    rows that cannot be used."""
    log, ids, bad = ReadLog(), RowIds(), BadRows()
    is_path = isinstance(pairs, str | Path)
    request = Request(dataset_name=str(pairs) if is_path else None, columns=columns)
    found: list[PreferencePair] = []
    for row in read_pairs(request, log, rows=None if is_path else numbered(pairs)):
        if isinstance(row, BadRow):
            bad.add(row)
        else:
            found.append(replace(row, id=ids.next_id(row.id.partition("-")[0])))
    encoded: list[EncodedPair] = []
    for pair, row in zip(found, encoder.encode_rows([(p.prompt, (p.chosen, p.rejected)) for p in found]), strict=True):
        if isinstance(row, RowError):
            bad.add(row.at(pair.source))
        else:
            encoded.append(EncodedPair(pair.id, row.prompt_ids, *row.response_ids, pair.group))
    if bad.total:
        lines = "\n".join(f"  {line}" for line in bad.lines())
        raise UserError(f"{bad.total:,} of {bad.total + len(encoded):,} pairs cannot be used:\n{lines}")
    if not encoded:
        raise UserError(EMPTY)
    return encoded


def numbered(rows: Iterable[Any]) -> Iterator[tuple[str, dict] | BadRow]:
    """(place, fields) of each row. What is no dictionary is a bad row."""
    for number, row in enumerate(rows):
        place = f"pairs[{number}]"
        if isinstance(row, Mapping):
            yield place, dict(row)
        else:
            yield BadRow(place, "DATA-18", "", f"is {type(row).__name__}, want a dictionary", CURE)


def write_rows(rows: Iterable[Any], folder: Path) -> Path:
    """A file of JSON lines with these rows, named after its content. Line n holds row n, counted from 1."""
    lines, problems = [], []
    for row in numbered(rows):
        if isinstance(row, BadRow):
            problems.append(str(row))
            continue
        try:
            lines.append(json.dumps(row[1], default=_plain))
        except (TypeError, ValueError) as error:
            problems.append(f"{row[0]}: cannot be written as JSON: {error}. Give text, or lists of messages.")
    if problems:
        raise UserError(*problems[:LISTED], *([f"{len(problems) - LISTED} more."] if problems[LISTED:] else []))
    if not lines:
        raise UserError(EMPTY)
    text = "".join(f"{line}\n" for line in lines)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        write_text(path, text)
    return path


def _plain(value: Any) -> Any:
    """Lists and numbers of NumPy, as a table's cells hold them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value is {type(value).__name__}")


EMPTY = "pairs is empty; expected at least one row with prompt, chosen and rejected."
