"""JSON without leniency: no repeated keys, no NaN or infinity, no overflow, no replacement characters.

Python's own parser accepts all of these in silence; the errors here say what was found and where in the line.
"""

from __future__ import annotations

import json

from laddpo.preference.reading.bad_rows import RowError

BOM = "\ufeff"


def decode_line(line: bytes, first: bool) -> str:
    """UTF-8 without guessing; a byte order mark is dropped at the start of the file only."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte {line[error.start]:#04x} at offset {error.start} of the line"
        raise RowError("DATA-21", "", problem, "Save the file as UTF-8.") from error
    if text.startswith(BOM):
        if not first:
            problem = "starts with a byte order mark inside the file"
            raise RowError("DATA-24", "", problem, "Files were joined; remove the mark (U+FEFF).")
        text = text[1:]
    return text


def parse_object(text: str, ends_file: bool = False) -> dict:
    """One strict JSON object: no repeated keys, no NaN or infinity, no overflow."""
    text = text.strip(" \t\r\n")
    try:
        return check_object(_STRICT.decode(text))
    except json.JSONDecodeError as error:
        if "control character" in error.msg:
            problem = f"has a raw control character at column {error.colno}"
            raise RowError("DATA-27", "", problem, "Write it escaped (\\n, \\t, \\u0001).") from error
        if ends_file and (error.pos >= len(text) - 1 or "Unterminated" in error.msg):
            problem = f"ends in the middle of the object ({error.msg} at column {error.colno})"
            raise RowError("DATA-35", "", problem, "The file may have been cut; copy it again.") from error
        problem = f"is not JSON: {error.msg} at column {error.colno}"
        raise RowError("DATA-35", "", problem, "Write one JSON object per line.") from error
    except RecursionError as error:
        raise RowError("DATA-38", "", "is nested too deep", "Rows are flat objects or lists of messages.") from error


def parse_value(text: str) -> object:
    """One strict JSON value, of any kind."""
    try:
        return _STRICT.decode(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError("DATA-35", "", f"is not JSON: {one_line(error)}", "Write it as JSON.") from error


def check_object(value: object) -> dict:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        kind = {list: "a list", str: "text", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
        raise RowError("DATA-18", "", f"is {kind}, want an object", 'Write each row as {"prompt": …, …}.')
    return value


def _unique_keys(items: list[tuple[str, object]]) -> dict:
    row = dict(items)
    if len(row) != len(items):
        seen: set[str] = set()
        repeated = next(key for key, _ in items if key in seen or seen.add(key))
        raise RowError("DATA-17", repeated, f"has the key {repeated!r} twice", "Keep one of them.")
    return row


def _no_constant(name: str) -> object:
    raise RowError("DATA-15", "", f"has the non-finite number {name}", "JSON has no such number; write null or text.")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise RowError("DATA-16", "", f"has the number {text[:40]}, too large to hold", "Write it as text.")
    return value


def _whole_number(text: str) -> int:
    if len(text) > 1000:  # Python refuses to convert very long digit strings, with a traceback of its own
        raise RowError("DATA-16", "", f"has a number of {len(text)} digits", "Write it as text.")
    return int(text)


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float, parse_int=_whole_number
)


def one_line(error: BaseException) -> str:
    """An error of a library as one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
