"""The rows that a request of laddpo/preference/sources.py asks for, before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laddpo.errors import UserError
from laddpo.preference.examples import MESSAGES
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog, read_rows
from laddpo.preference.reading.guesses import LISTS, PAIR, guess_columns, guess_scores, taken_text
from laddpo.preference.reading.hub import hub_rows
from laddpo.preference.reading.locate import locate
from laddpo.preference.reading.unread import accounted

if TYPE_CHECKING:
    from laddpo.preference.sources import Request


def with_guesses(request: Request, log: ReadLog, *, is_pair: bool) -> Request:
    """The request with columns that rows have under another common name, which the log says in one line."""
    seen = first_values(request, ("chosen", "rejected", "candidates", *(LISTS if is_pair else ())))
    guessed = guess_columns(seen, request.columns, request.dataset_name, is_pair=is_pair)
    if is_pair:
        reads_scores = request.pair_rule.min_gap is not None
        guessed |= guess_scores(seen, {**request.columns, **guessed}, request.dataset_name, reads_scores)
    if said := taken_text(guessed):
        log.warn(said)
    return replace(request, columns={**request.columns, **guessed}) if guessed else request


def first_values(request: Request, names: Sequence[str] = ("chosen", "rejected")) -> dict[str, Any]:
    """A value of each column, of the first rows. In tables only our `names` are decoded: the others are None."""
    scratch, seen = ReadLog(), {}
    if files := local_files(request, scratch):
        kind = "json" if request.format == "json" else None
        rows = read_rows(
            files, request.max_line_bytes, scratch, kind, wanted=[request.columns.get(n) or n for n in names]
        )
    else:
        rows = hub_rows(request.dataset_name, request.dataset_split, request.revision, scratch, request.dataset_config)
    with closing(rows):
        for row in islice(rows, LOOKED_AT):
            seen = seen if isinstance(row, BadRow) else {**row[1], **seen}
    return seen


def raw_rows(
    request: Request, log: ReadLog, names: Sequence[str] = ("prompt", "answer")
) -> Iterator[tuple[str, dict] | BadRow]:
    """Rows of the files that the name means, else of the hub; `names` are our names of the columns that will be used,
    by default those of questions."""
    files = local_files(request, log)
    if files:
        kind = "json" if request.format == "json" else None
        columns = {name: request.columns.get(name) or name for name in names}
        text = [columns[name] for name in TEXT_COLUMNS if name in columns]
        rows = read_rows(files, request.max_line_bytes, log, kind, text, columns.values())
    else:
        rows = hub_rows(request.dataset_name, request.dataset_split, request.revision, log, request.dataset_config)
    return accounted(rows, names, request.columns, request.dataset_name, log.warn)


def local_files(request: Request, log: ReadLog) -> list[Path]:
    if not request.dataset_name:
        raise UserError("data.dataset_name is not set. Give a local path, or a hub id such as org/name.")
    return locate(
        request.dataset_name,
        request.preference_dir,
        log,
        request.follow_symlinks,
        request.dataset_split,
        request.dataset_config,
    )


LOOKED_AT = 50  # rows from which columns are guessed
TEXT_COLUMNS = (*PAIR, "response", "completion", MESSAGES)
