"""Reads one JSON array of rows. The file is held in memory whole, so its size has a limit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from laddpo.preference.reading.bad_rows import BadRow, RowError, file_error
from laddpo.preference.reading.strict_json import one_line, parse_object

MOST_BYTES = 512 * 2**20  # of a file; its text takes up to four times as much


def read_json_array(path: Path, stream: BinaryIO, max_line_bytes: int) -> Iterator[tuple[str, dict] | BadRow]:
    """One JSON array of objects. A bad row ends nothing, a broken array ends the file."""
    text = _whole_text(path, stream)
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        advice = "A .json file is one array of objects; objects line by line belong in .jsonl."
        raise file_error(path, "DATA-20", f"starts with {text[at : at + 1]!r}, not with '['", advice)

    line, separator = 1 + text.count("\n", 0, at), "["
    while separator != "]":
        start = _after_space(text, at + 1)
        line += text.count("\n", at, start)
        if separator == "[" and text[start : start + 1] == "]":
            at = start
            break

        end = _end_of_value(path, text, start, line, max_line_bytes)
        try:
            yield f"{path}:{line}", parse_object(text[start:end])
        except RowError as error:
            yield error.at(f"{path}:{line}")

        at = _after_space(text, end)
        line += text.count("\n", start, at)
        separator = text[at : at + 1]
        if separator not in (",", "]") or not separator:
            found = repr(separator) if separator else "the end of the file"
            problem = f"line {line}: found {found}, expected a comma or the end of the array"
            raise file_error(path, "DATA-35", problem, "Repair the file; if it was cut, copy it again.")

    if _after_space(text, at + 1) < len(text):
        raise file_error(path, "DATA-35", f"line {line}: there is more after the array", "Keep one array per file.")


def _whole_text(path: Path, stream: BinaryIO) -> str:
    content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise file_error(
            path,
            "DATA-37",
            f"is a JSON array of more than {MOST_BYTES:,} bytes",
            "Convert it to JSON lines, which have no such limit: jq -c '.[]' rows.json > rows.jsonl",
        )
    if not content.strip():
        raise file_error(path, "DATA-39", "has 0 rows", "Give a file with at least one row.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 near byte {error.start}"
        raise file_error(path, "DATA-21", problem, "Save the file as UTF-8.") from error


def _end_of_value(path: Path, text: str, start: int, line: int, limit: int) -> int:
    """Where the JSON value that starts here ends, whatever it is worth as a row."""
    try:
        _, end = _LENIENT.raw_decode(text, start)
    except RecursionError as error:
        raise file_error(path, "DATA-35", f"line {line}: {one_line(error)}", "Repair it.") from error
    except json.JSONDecodeError as error:
        end = len(text) if error.msg.startswith("Unterminated string") else error.pos
        if end - start <= limit:
            line += text.count("\n", start, error.pos)
            found = text[error.pos : error.pos + 20]
            problem = f"line {line}: {error.msg}; found {repr(found) if found else 'the end of the file'}"
            raise file_error(path, "DATA-35", problem, "Repair it.") from error
    if end - start > limit:
        problem = f"line {line}: a row is longer than {limit:,} characters"
        raise file_error(path, "DATA-37", problem, "Raise data.max_line_bytes if that is right.")
    return end


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


_SPACE = re.compile(r"[ \t\r\n]*")
_LENIENT = json.JSONDecoder(parse_float=str, parse_int=str, strict=False)  # what a row may hold is checked after
