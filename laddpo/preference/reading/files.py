"""Reads local files of rows strictly and in bounded memory: JSON lines, a JSON array, CSV, parquet, Arrow, or packed.

Every row comes out as a dictionary with its place ("file:line"), every bad one as a BadRow that says what was found,
what was expected and what to do. What makes a whole file unusable is a UserError. Nothing is repaired in silence and
nothing is decoded with replacement characters. Codes DATA-nn are stable: see CODES in
laddpo/preference/reading/bad_rows.py.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
import stat
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from laddpo.errors import UserError, nearest
from laddpo.preference.reading.bad_rows import BadRow, RowError, file_error, printable
from laddpo.preference.reading.compression import open_plain
from laddpo.preference.reading.json_arrays import read_json_array
from laddpo.preference.reading.pair_counts import PairCounts
from laddpo.preference.reading.splits import PACKED_SUFFIXES, SUFFIXES, last_suffix
from laddpo.preference.reading.strict_json import decode_line, one_line, parse_object
from laddpo.preference.reading.tables import read_arrow, read_parquet
from laddpo.storage.atomic import file_sha256
from laddpo.storage.seals import require_if_sealed


@dataclass
class ReadLog:
    """What reading found besides rows: files with their rows, unread files with their split, things worth a warning
    with their counts, the commit of each dataset of the hub, what else a source has to say for the report, and what
    was made of scores and lists of answers."""

    files: dict[str, int] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    pairs: PairCounts = field(default_factory=PairCounts)

    def warn(self, message: str, count: int = 1) -> None:
        message = printable(message)
        self.warnings[message] = self.warnings.get(message, 0) + count


RawRow = tuple[str, dict]  # (place, fields)
DATA = "data.dataset_name"  # the setting that may also name a folder
LINE_CURE = "Check its line ends, or raise data.max_line_bytes."


def read_rows(
    files: list[Path],
    max_line_bytes: int,
    log: ReadLog,
    kind: str | None = None,
    text_columns: Sequence[str] = (),
    wanted: Container[str] | None = None,
    key: str = DATA,
) -> Generator[RawRow | BadRow, None, None]:
    """The rows of the files in the given order. Raises UserError for a file that cannot be read as rows at all.

    `kind` (a key of READERS) overrules the files' names; `text_columns` must hold text or messages where the file says
    what its columns hold.

    Of parquet and Arrow only the columns `wanted` (None: all) are decoded; rows have None in the rest.
    `key`: the setting that names the files.
    """
    columns: tuple[Path, tuple[str, ...]] | None = None
    for path in files:
        rows, name = 0, printable(path)
        reader = READERS[kind or file_kind(path)]
        options = {"text_columns": text_columns, "wanted": wanted} if reader in (read_parquet, read_arrow) else {}
        if reader is read_csv:
            options = {"text_columns": text_columns, "warn": log.warn}
        with open_checked(path, log, key) as stream:
            for row in reader(path, stream, max_line_bytes, **options):
                rows += 1
                if reader in SCHEMA_READERS and not isinstance(row, BadRow):
                    columns = same_columns(columns, path, tuple(row[1]))
                yield row if name == str(path) or isinstance(row, BadRow) else (printable(row[0]), row[1])
        if rows == 0:
            raise file_error(path, "DATA-39", "has 0 rows", "Give a file with at least one row.")
        log.files[name] = rows


@contextmanager
def open_checked(path: Path, log: ReadLog, key: str = DATA) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked, once it is known to be a regular readable file; complains if it changes meanwhile."""
    with readable(path, key) as before, path.open("rb") as raw:
        require_if_sealed(path)
        yield open_plain(path, raw, log.warn)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise file_error(path, "DATA-52", "changed while it was read", "Run again when nothing writes to it.")


@contextmanager
def readable(path: Path, key: str = DATA) -> Iterator[os.stat_result]:
    """Turns what makes a path unreadable into UserErrors; a pipe or device is refused before it could block. `key`: the
    setting that names the path."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            problem = "is a folder" if stat.S_ISDIR(found.st_mode) else "is not a regular file"
            raise file_error(path, "DATA-42", problem, f"Give a file{', or a folder of files' if key == DATA else ''}.")
        yield found
    except PermissionError as error:
        mode = stat.filemode(path.lstat().st_mode) if os.path.lexists(path) else "?"
        problem = f"may not be read (mode {mode}, we are uid {os.getuid() if hasattr(os, 'getuid') else '?'})"
        raise file_error(path, "DATA-43", problem, "Change its permissions.") from error
    except FileNotFoundError as error:
        raise missing_file(path, key) from error
    except OSError as error:
        raise file_error(path, "DATA-43", f"could not be read: {one_line(error)}", "Check the disk.") from error


def content_sha256(path: Path) -> str:
    """sha256 of a data file's bytes."""
    with readable(path):
        return file_sha256(path)


def missing_file(path: Path, key: str = "data.dataset_name") -> UserError:
    """Why a path that the setting `key` gave cannot be had: a broken link, or nothing there (naming what is near)."""
    if path.is_symlink():
        target = os.readlink(path)
        return file_error(path, "DATA-44", f"is a link to {target!r}, which is not there", "Restore the link's target.")
    try:
        siblings = sorted(p.name for p in path.parent.iterdir())
    except OSError:  # no such folder, or one that may not be listed
        siblings = []
    guess = nearest(path.name, siblings)
    hint = f" Did you mean {path.parent / guess}?" if guess else ""
    return file_error(path, "DATA-41", f"not found from {Path.cwd()}", f"Check {key}.{hint}")


def file_kind(path: Path) -> str:
    """jsonl, json, csv or parquet by the name, the packing suffix aside."""
    suffix = last_suffix(path.name)
    kind = SUFFIXES.get(suffix)
    if kind is None:
        if suffix in ARCHIVE_SUFFIXES:
            raise file_error(path, "DATA-48", "is an archive of files", "Unpack it first and give the folder.")
        known, packed = ", ".join(sorted(SUFFIXES)), ", ".join(PACKED_SUFFIXES)
        advice = f"Rename it to end in one of {known} (+ {packed})."
        raise file_error(path, "DATA-41", "has no known kind of name", advice)
    return kind


def read_json_lines(path: Path, stream: BinaryIO, max_line_bytes: int) -> Iterator[RawRow | BadRow]:
    """One JSON object per line. Lines end at `\\n` bytes alone: U+2028 and U+0085 inside a text do not end a row."""
    started = False
    for number, line in numbered_lines(path, stream, max_line_bytes):
        if not line.strip(b" \t\r\n"):
            continue
        place = f"{path}:{number}"
        if not started:
            refuse_other_kinds(path, line)
            started = True
        try:
            row = parse_object(decode_line(line, first=number == 1), ends_file=not line.endswith(b"\n"))
        except RowError as error:
            yield error.at(place)
        else:
            yield place, row


def read_csv(
    path: Path,
    stream: BinaryIO,
    max_line_bytes: int,
    text_columns: Sequence[str] = (),
    warn: Callable[[str], None] = lambda note: None,
) -> Iterator[RawRow | BadRow]:
    """Rows under a header, separated by commas (.tsv: tabs), else by what the header shows; every field is text. A
    quoted field may span lines. NA and the like mean a missing value: null, and in `text_columns` a bad row."""
    csv.field_size_limit(max_line_bytes)
    before = length = 0  # lines before those that the reader counts, characters of the row at hand

    def lines_of_rows() -> Iterator[str]:
        nonlocal length
        for line in text_lines(path, stream, max_line_bytes):
            length += len(line)
            if length > max_line_bytes:
                problem = f"line {before + rows.line_num + 1}: its row is longer than {max_line_bytes:,} characters"
                raise file_error(path, "DATA-37", problem, "Check its quotes, or raise data.max_line_bytes.")
            yield line

    lines = lines_of_rows()
    rows = csv.reader(lines, delimiter="\t" if last_suffix(path.name) == ".tsv" else ",", strict=True)
    try:
        header = next((row for row in rows if any(map(str.strip, row))), [])  # blank lines may precede it
        if len(header) == 1 and (separator := next((mark for mark in SEPARATORS if mark in header[0]), None)):
            warn(f"{path}: its columns are separated by {separator!r}, not by commas, and are read so")
            header = next(csv.reader(header, delimiter=separator, strict=True))
            before = rows.line_num
            rows = csv.reader(lines, delimiter=separator, strict=True)
        if len(set(header)) != len(header):
            raise file_error(path, "DATA-17", f"has a repeated column in its header {header}", "Rename one of them.")
        while True:
            place, length = f"{path}:{before + rows.line_num + 1}", 0
            row = next(rows, None)
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(header):
                problem = f"has {len(row)} fields, the header has {len(header)}"
                yield BadRow(place, "DATA-57", "", problem, "Quote fields that contain commas or line ends.")
                continue
            fields: dict[str, Any] = dict(zip(header, row, strict=True))
            missing = [name for name, text in fields.items() if text.strip() in MISSING]
            if named := next((name for name in missing if name in text_columns and fields[name].strip()), None):
                problem = f"is {fields[named]!r}, which means a missing value in CSV"
                yield BadRow(place, "DATA-04", named, problem, "Give a text, or write the row in JSON if it is meant.")
                continue
            yield place, fields | {name: None for name in missing if name not in text_columns}
    except csv.Error as error:
        raise file_error(
            path, "DATA-57", f"line {before + rows.line_num}: {error}", "Repair the CSV quoting."
        ) from error


def same_columns(
    known: tuple[Path, tuple[str, ...]] | None, path: Path, columns: tuple[str, ...]
) -> tuple[Path, tuple[str, ...]]:
    """Table files read together must have the same columns."""
    if known is not None and set(known[1]) != set(columns):
        problem = f"has the columns {sorted(columns)}, but {known[0]} has {sorted(known[1])}"
        raise file_error(path, "DATA-56", problem, "Read files of different kinds as separate sources.")
    return known or (path, columns)


def numbered_lines(
    path: Path, stream: BinaryIO, max_line_bytes: int, cure: str = LINE_CURE
) -> Iterator[tuple[int, bytes]]:
    """Lines with their number, from 1; a line longer than the limit is refused without being read whole."""
    number = 0
    while line := stream.readline(max_line_bytes + 1):
        number += 1
        if len(line) > max_line_bytes:
            problem = f"line {number} is longer than {max_line_bytes:,} bytes"
            raise file_error(path, "DATA-37", problem, cure)
        yield number, line


def text_lines(path: Path, stream: BinaryIO, max_line_bytes: int, cure: str = LINE_CURE) -> Iterator[str]:
    """Lines as text, with their ends; `UserError` names the one that is not UTF-8 or too long."""
    for number, line in numbered_lines(path, stream, max_line_bytes, cure):
        try:
            yield decode_line(line, first=number == 1)
        except RowError as error:
            raise UserError(str(error.at(f"{path}:{number}"))) from error


def refuse_other_kinds(path: Path, line: bytes) -> None:
    """A .jsonl whose first line shows that it is something else."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00{" in line[:8] or line[1:2] == b"\x00":
        raise file_error(path, "DATA-22", "is UTF-16 or UTF-32 text", "Save it as UTF-8.")
    text = line.removeprefix(codecs.BOM_UTF8).strip()
    if b"\r" in text and text.startswith(b"{"):
        raise file_error(path, "DATA-25", "ends its lines with a lone CR", "Save it with \\n line ends.")
    if text.startswith(b"["):
        raise file_error(path, "DATA-19", "holds a JSON array", "Rename it to .json, or write one object per line.")
    if text == b"{":
        advice = "Write each object on one line, or put them in an array and name the file .json."
        raise file_error(path, "DATA-20", "holds an object spread over several lines", advice)
    if b"," in text and not text.startswith((b"{", b'"')) and re.fullmatch(rb"[\w \"',;.-]+", text):
        raise file_error(path, "DATA-57", f"looks like CSV ({text[:60]!r})", "Rename it to .csv.")


SEPARATORS = (";", "\t", "|")
MISSING = ("", "nan", "NaN", "NA", "N/A", "<NA>", "#N/A", "null", "NULL")  # as pandas and databases write it
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".7z")
READERS: dict[str, Callable[..., Iterator[RawRow | BadRow]]] = {
    "jsonl": read_json_lines,
    "json": read_json_array,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
SCHEMA_READERS = (read_csv, read_parquet, read_arrow)
