"""Bad rows: how one is described, the stable codes, and the rule for when they stop the run.

`on_bad_row=error` reads to the end, then stops with the first twenty and the count, rows with the same problem in one
line with the places of the first five; `skip` counts them with reason and example, and stops only when they are more
than `max_bad_fraction` of all rows.
"""

from __future__ import annotations

import json
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from laddpo.errors import UserError

LISTED = 20  # problems shown in an error message
PLACES = 5  # rows whose places are named beside one problem
PROBLEMS_KEPT = 10_000  # to choose them from; rows with yet other problems are only counted
EXAMPLES = 3  # bad rows kept per code for the report


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where, stable code, field ("" for the whole row), what is wrong, what to do. `fits`:
    the data.max_length under which it could be used, 0 if that is not the problem.

    Halves of surrogate pairs that they quote of the row are escaped, so that all can be written and printed.
    """

    place: str
    code: str
    field: str
    problem: str
    advice: str
    fits: int = 0

    def __post_init__(self) -> None:
        for name in ("place", "code", "field", "problem", "advice"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        named = f"{self.field}: " if self.field else ""
        return f"{self.place}: {named}{self.problem} ({self.code}). {self.advice}"


class RowError(UserError):
    """Raised by code that looks at a row and does not know its place. Readers add the place. If none does, as for a
    prompt on the command line, it ends the stage like any mistake of the user."""

    def __init__(self, code: str, field: str, problem: str, advice: str, fits: int = 0):
        super().__init__(f"{field}: {problem} ({code}). {advice}" if field else f"{problem} ({code}). {advice}")
        self.code, self.field, self.problem, self.advice, self.fits = code, field, problem, advice, fits

    def at(self, place: str) -> BadRow:
        return BadRow(place, self.code, self.field, self.problem, self.advice, self.fits)


def made_of(
    rows: Iterable[tuple[str, dict] | BadRow], make: Callable[[str, dict], Iterable[Any]]
) -> Iterator[Any | BadRow]:
    """What `make(place, fields)` gives for each row. Bad rows pass, and a row that it refuses becomes one."""
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield from make(*row)
        except RowError as error:
            yield error.at(row[0])


def file_error(path: Path | str, code: str, problem: str, advice: str) -> UserError:
    """The error for a file that cannot be used at all."""
    return UserError(printable(f"{path}: {problem} ({code}). {advice}"))


def printable(text: object) -> str:
    """The text with what UTF-8 cannot hold escaped: halves of surrogate pairs, as odd bytes of a file name become."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class BadRows:
    """Collects the bad rows of one run: counts per code, a few examples of each, and of every problem its first rows.

    Every one is written to `log` as a JSON line, without the text of the row.
    """

    log: IO[str] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    first: dict[tuple[str, ...], list[BadRow]] = field(default_factory=dict)
    rows_by_problem: Counter[tuple[str, ...]] = field(default_factory=Counter)
    fits: Counter[tuple[str, ...]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, row: BadRow) -> None:
        self.counts[row.code] += 1
        if self.log is not None:
            record = {name: value for name, value in asdict(row).items() if name != "fits"}
            self.log.write(json.dumps(record, ensure_ascii=False) + "\n")
        shown = self.examples.setdefault(row.code, [])
        if len(shown) < EXAMPLES:
            shown.append(str(row))
        problem = (row.code, row.field, "" if row.fits else row.problem, row.advice)
        if problem in self.first or len(self.first) < PROBLEMS_KEPT:
            self.rows_by_problem[problem] += 1
            self.fits[problem] = max(self.fits[problem], row.fits)
            known = self.first.setdefault(problem, [])
            insort(known, row, key=place_order)  # rows are encoded in another order than the file's
            del known[PLACES:]

    def lines(self) -> list[str]:
        """The first twenty problems in the order of file and line, each with its rows counted; then how many rows have
        others."""
        shown = sorted(self.first, key=lambda problem: place_order(self.first[problem][0]))[:LISTED]
        lines = [_line(self.first[problem], self.rows_by_problem[problem], self.fits[problem]) for problem in shown]
        rest = self.total - sum(self.rows_by_problem[problem] for problem in shown)
        return [*lines, f"… and {rest:,} more."] if rest else lines

    def stop_if_too_many(self, on_bad_row: str, max_bad_fraction: float, rows_read: int) -> None:
        """Raise UserError when the rule says that these bad rows stop the run."""
        if self.total and on_bad_row == "error":
            self._stop(
                f"{self.total:,} of {rows_read:,} rows cannot be used:",
                "Fix the rows, or set data.on_bad_row=skip to leave them out and have them counted.",
            )
        if rows_read and self.total == rows_read:
            self._stop(f"None of the {rows_read:,} rows can be used (DATA-40):", "Fix the rows.")
        if rows_read and self.total / rows_read > max_bad_fraction:
            self._stop(
                f"{self.total:,} of {rows_read:,} rows ({self.total / rows_read:.1%}) cannot be used, more than "
                f"data.max_bad_fraction={max_bad_fraction}:",
                "Fix the rows or raise data.max_bad_fraction.",
            )

    def _stop(self, head: str, advice: str) -> None:
        raise UserError("\n".join([head, *(f"  {line}" for line in self.lines()), advice]))


def _line(first: list[BadRow], count: int, fits: int = 0) -> str:
    """One problem in one line, at the places of its `first` rows: `2 rows, at a.jsonl:3, :9: chosen: is empty (…)`."""
    if fits:
        problem = f"{first[0].problem}; data.max_length={fits} would fit {'it' if count == 1 else f'all {count:,}'}"
        first = [replace(first[0], problem=problem), *first[1:]]
    places, file = [], None
    for row in first:
        name, _, number = row.place.rpartition(":")
        places.append(f":{number}" if name and name == file else row.place)
        file = name
    line = str(replace(first[0], place=", ".join(places)))
    if count == 1:
        return line
    return f"{count:,} rows, {'first at' if count > len(first) else 'at'} {line}"


def place_order(row: BadRow) -> tuple[str, int]:
    """By file, then by line: places are written `file:line`."""
    name, _, number = row.place.rpartition(":")
    return (name, int(number)) if number.isdecimal() else (row.place, 0)


CODES: dict[str, str] = {
    "DATA-01": "a field is missing",
    "DATA-04": "a field is null",
    "DATA-05": "the prompt is empty",
    "DATA-07": "a response is empty",
    "DATA-08": "a field has only white space or invisible characters",
    "DATA-09": "chosen and rejected are the same: no preference",
    "DATA-10": "chosen and rejected have the same tokens",
    "DATA-12": "a field is a number or an object, not text",
    "DATA-13": "a field is true or false, not text",
    "DATA-15": "a number is NaN or infinite",
    "DATA-16": "a number is too large to hold",
    "DATA-17": "a key or column occurs twice",
    "DATA-18": "a row is not an object",
    "DATA-19": "a .jsonl file holds one array",
    "DATA-20": "objects are spread over lines, or a .json file holds no array",
    "DATA-21": "bytes are not UTF-8",
    "DATA-22": "the file is UTF-16 or UTF-32",
    "DATA-24": "a byte order mark inside the file",
    "DATA-25": "lines end with a lone CR",
    "DATA-27": "a raw control character in JSON",
    "DATA-28": "a text contains the character NUL",
    "DATA-29": "a text contains half of a surrogate pair",
    "DATA-35": "JSON is broken or cut",
    "DATA-37": "a line is longer than the limit",
    "DATA-38": "a row is nested too deep",
    "DATA-39": "the file has no rows",
    "DATA-40": "no row can be used",
    "DATA-41": "the file is not there, or its kind is unknown",
    "DATA-42": "not a regular file",
    "DATA-43": "the file may not be read",
    "DATA-44": "a link leads nowhere, or out of its folder",
    "DATA-45": "the packed file ends early",
    "DATA-46": "the packed file is damaged",
    "DATA-48": "the file is an archive",
    "DATA-49": "the packed file unpacks to suspiciously much",
    "DATA-51": "a module needed to read the file is missing",
    "DATA-52": "the file changed while it was read",
    "DATA-53": "a parquet column has the wrong type",
    "DATA-54": "the parquet file is cut or damaged",
    "DATA-55": "a parquet column is binary",
    "DATA-56": "files read together have different columns",
    "DATA-57": "CSV is broken, or named .jsonl",
    "DATA-58": "text and messages are mixed in a row",
    "DATA-59": "text rows and message rows are mixed in a file",
    "DATA-60": "messages are not a list, or an empty one",
    "DATA-61": "a message lacks role or content",
    "DATA-62": "a message has parts other than text",
    "DATA-63": "a message has an unknown role",
    "DATA-64": "messages are in the wrong order",
    "DATA-65": "the prompt ends, or the response starts, with the wrong role",
    "DATA-66": "chosen and rejected differ before the last turn",
    "DATA-67": "chosen and rejected share no whole prompt",
    "DATA-68": "a response has several turns",
    "DATA-70": "the split is not there, or a file is of two splits",
    "DATA-71": "a part of the data set is missing, or there twice",
    "DATA-72": "the configuration of the data set is not there",
    "DATA-74": "text, or text and template together, spell a special token",
    "DATA-75": "the row is longer than data.max_length",
    "DATA-79": "a text is too long to be tokenised",
    "DATA-88": "no pair is held out",
    "DATA-91": "the path has a form that is not allowed",
    "DATA-83": "the row repeats another",
    "DATA-87": "the prompt is one that a model will be tested on",
    "DATA-93": "the dataset cannot be loaded from the hub",
    "DATA-95": "the chat template refuses the row or loses text of it",
    "DATA-96": "the tokenizer has ids for which the model has no embedding",
    "DATA-101": "a message has a key that is not read",
    "DATA-102": "messages are stored as text",
    "DATA-103": "there are two system texts",
    "DATA-104": "no row has the column that a setting names",
    "DATA-108": "several columns may be meant",
    "DATA-109": "the chosen answer scored lower",
    "DATA-110": "a score, rank, weight or margin is missing or no number that can be used",
    "DATA-111": "answers have no scores",
    "DATA-107": "the prompt of a test row is also trained on",
    "DATA-105": "an answer has a label instead of a counterpart",
    "DATA-120": "a label says neither yes nor no",
    "DATA-121": "labels are numbers whose meaning is not clear",
    "DATA-122": "a completion has both labels",
    "DATA-123": "all labels say the same",
    "DATA-106": "the response repeats a tag that the template opens",
    "DATA-130": "tools, or calls of tools, are not as templates take them",
    "DATA-131": "variables for the template are not as it takes them",
}
