"""Preference rows that a caller of the package gives: read and encoded in their order, or written into a file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from laddpo.errors import UserError, visible
from laddpo.preference.encoding.encode import EncodedCompletion, EncodedPair, TextEncoder
from laddpo.preference.reading.bad_rows import BadRow, BadRows, RowError, made_of
from laddpo.preference.reading.files import ReadLog, read_rows
from laddpo.preference.reading.guesses import seen_kind
from laddpo.preference.reading.pairs import OF_ROW, PreferencePair, Prompt, RowIds, UnpairedRow
from laddpo.preference.reading.rows import RowRules, as_prompt, get_field
from laddpo.preference.requested import LOOKED_AT
from laddpo.preference.sources import Request, read_pairs
from laddpo.preference.unpaired import are_unpaired, read_unpaired
from laddpo.storage.atomic import write_text

CURE = (
    "Give dictionaries with prompt, chosen and rejected, or prompt, completion and label; of a DataFrame, "
    "frame.to_dict('records')."
)
LISTED = 20  # problems shown in an error message


def encoded_rows(
    pairs: str | Path | Iterable[Any], columns: Mapping[str, str], encoder: TextEncoder
) -> list[EncodedPair] | list[EncodedCompletion]:
    """The pairs or unpaired rows of a file or of dictionaries, in their order, with the ids that `prepare` gives them.
    `UserError` names the rows that cannot be used."""
    log, ids, bad = ReadLog(), RowIds(), BadRows()
    is_path = isinstance(pairs, str | Path)
    request = Request(dataset_name=str(pairs) if is_path else None, columns=columns)
    rows = None if is_path else list(numbered(pairs))
    is_unpaired = are_unpaired(request) if is_path else seen_kind(_seen(rows), columns) == "unpaired"
    found: list[PreferencePair | UnpairedRow] = []
    for row in (read_unpaired if is_unpaired else read_pairs)(request, log, rows=rows):
        if isinstance(row, BadRow):
            bad.add(row)
        else:
            found.append(replace(row, id=ids.next_id(row.id.partition("-")[0])))
    encoded: list = []
    texts = [(row.prompt, (row.completion,) if is_unpaired else (row.chosen, row.rejected)) for row in found]
    for given, row in zip(found, encoder.encode_rows(texts), strict=True):
        if isinstance(row, RowError):
            bad.add(row.at(given.source))
        elif is_unpaired:
            ids_of = (row.prompt_ids, *row.response_ids)
            encoded.append(EncodedCompletion(given.id, *ids_of, given.label, given.group, given.weight))
        else:
            ids_of = (row.prompt_ids, *row.response_ids)
            encoded.append(EncodedPair(given.id, *ids_of, given.group, given.weight, given.margin))
    if bad.total:
        lines, noun = "\n".join(f"  {line}" for line in bad.lines()), "rows" if is_unpaired else "pairs"
        raise UserError(f"{bad.total:,} of {bad.total + len(encoded):,} {noun} cannot be used:\n{lines}")
    if not encoded:
        raise UserError(EMPTY)
    return encoded


def _seen(rows: list[tuple[str, dict] | BadRow]) -> dict[str, Any]:
    """A value of each column of the first rows."""
    fields = [row[1] for row in rows[:LOOKED_AT] if not isinstance(row, BadRow)]
    return {name: value for row in reversed(fields) for name, value in row.items()}


def read_prompts(path: Path, max_line_bytes: int) -> list[tuple[str | list, Prompt]]:
    """The prompts of a file of rows with prompt, and perhaps tools and chat_template_kwargs: as the row has it, and as
    it is asked. A note names other columns. `UserError` names the rows that cannot be used."""
    log, bad, found, unread = ReadLog(), BadRows(), [], {}

    def keep(_: str, row: dict) -> tuple:
        used = {name: row[name] for name in ("prompt", *OF_ROW) if name in row}
        unread.update(dict.fromkeys(row.keys() - used.keys()))
        found.append((row.get("prompt"), prompt_in(used)))
        return ()

    for row in made_of(read_rows([path], max_line_bytes, log, key="prompts"), keep):
        bad.add(row)
    if bad.total:
        lines = "\n".join(f"  {line}" for line in bad.lines())
        raise UserError(f"{path}: {bad.total:,} of {bad.total + len(found):,} prompts cannot be used:\n{lines}")
    if not found:
        raise UserError(f'{path}: holds no prompt; expected rows such as {{"prompt": "a question"}}.')
    if unread:
        names = ", ".join(sorted(map(str, unread)))
        print(visible(f"note: {path}: columns that are not read: {names}"), file=sys.stderr)
    return found


def prompt_in(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row: a text or a list of messages, with its tools and variables for the template. RowError."""
    if unread := [key for key in row if key not in ("prompt", *OF_ROW)]:
        problem = f"is not read; a prompt has the keys prompt, {', '.join(OF_ROW)}"
        raise RowError("DATA-01", str(unread[0]), problem, "Remove it.")
    return as_prompt(dict(row), get_field(dict(row), "prompt", RowRules()), RowRules(), lambda _: None)


def numbered(rows: Iterable[Any]) -> Iterator[tuple[str, dict] | BadRow]:
    """(place, fields) of each row. What is no dictionary is a bad row. `UserError` for what has no rows."""
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise UserError(f"pairs is {type(rows).__name__}; expected a list of dictionaries, a data set, or a path.")
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


EMPTY = "pairs is empty; expected at least one row with prompt, chosen and rejected, or prompt, completion and label."
