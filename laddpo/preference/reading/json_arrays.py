"""Reads one JSON array of rows piece by piece: memory is bounded by the longest row, not by the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from laddpo.preference.reading.bad_rows import BadRow, RowError, file_error
from laddpo.preference.reading.strict_json import one_line, parse_object


def read_json_array(path: Path, stream: BinaryIO, max_line_bytes: int) -> Iterator[tuple[str, dict] | BadRow]:
    """One JSON array of objects, read piece by piece: memory is bounded by the longest row, not by the file."""
    text = _TextWindow(path, stream)
    if (start := text.peek()) != "[":
        advice = "A .json file is one array of objects; objects line by line belong in .jsonl."
        raise file_error(path, "DATA-20", f"starts with {start!r}, not with '['", advice)
    text.skip(1)
    is_first = True
    while (separator := text.peek()) != "]":
        if not is_first:
            if separator != ",":
                problem = f"line {text.line}: found {separator!r}, expected a comma or the end of the array"
                raise file_error(path, "DATA-35", problem, "Repair the file.")
            text.skip(1)
            text.peek()
        is_first = False
        place, value_text = f"{path}:{text.line}", text.take_value(max_line_bytes)
        try:
            yield place, parse_object(value_text)
        except RowError as error:
            yield error.at(place)
    text.skip(1)
    if not text.is_at_end():
        raise file_error(path, "DATA-35", f"line {text.line}: goes on after its array", "Keep one array per file.")


class _TextWindow:
    """A growing window over the characters of a stream, of which the part already used is forgotten."""

    def __init__(self, path: Path, stream: BinaryIO):
        self._path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._is_over = False
        self._bytes_read = 0
        self.window, self.position, self.line = "", 0, 1

    def peek(self) -> str:
        """The next character that is not white space, which is skipped; the end of the file is an error."""
        while True:
            match = re.compile(r"[ \t\r\n]*").match(self.window, self.position)
            self.skip(match.end() - self.position)
            if self.position < len(self.window):
                return self.window[self.position]
            if not self.grow(1 << 62):
                if self._bytes_read == 0:
                    raise file_error(self._path, "DATA-39", "has 0 rows", "Give a file with at least one row.")
                problem = f"ends at line {self.line} without closing its array"
                raise file_error(self._path, "DATA-35", problem, "The file may have been cut; copy it again.")

    def skip(self, count: int) -> None:
        self.line += self.window.count("\n", self.position, self.position + count)
        self.position += count

    def take_value(self, limit: int) -> str:
        """The text of the JSON value that starts here."""
        while True:
            start = self.position
            try:
                _, end = _LENIENT.raw_decode(self.window, start)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self.grow(limit):
                    continue
                line = self.line + error.doc.count("\n", start, error.pos)  # of what stood in the window then
                found = error.doc[error.pos : error.pos + 20]
                problem = f"line {line}: {error.msg}; found {repr(found) if found else 'the end of the file'}"
                raise file_error(self._path, "DATA-35", problem, "Repair it.") from error
            except RecursionError as error:
                raise file_error(self._path, "DATA-35", f"line {self.line}: {one_line(error)}", "Repair it.") from error
            if end == len(self.window) and self.grow(limit):
                continue  # a number may go on
            value_text = self.window[self.position : end]
            self.skip(end - self.position)
            return value_text

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could mend it: the value stops inside a string, or within the last token."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self.window) - LONGEST_TOKEN

    def is_at_end(self) -> bool:
        """Whether only white space is left."""
        while not self.window[self.position :].strip():
            self.position = len(self.window)
            if not self.grow(1 << 62):
                return True
        return False

    def grow(self, limit: int) -> bool:
        """Read more; False at the end of the file. The window never holds more than `limit` unused characters."""
        unused = len(self.window) - self.position
        if self._is_over:
            return False
        if unused > limit:
            problem = f"line {self.line}: a row is longer than {limit:,} characters"
            raise file_error(self._path, "DATA-37", problem, "Raise data.max_line_bytes if that is right.")
        block = self._stream.read(max(1 << 20, unused))
        self._is_over = not block
        try:
            fresh = self._decoder.decode(block, final=self._is_over)
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 near byte {self._bytes_read + error.start}"
            raise file_error(self._path, "DATA-21", problem, "Save the file as UTF-8.") from error
        self._bytes_read += len(block)
        self.window, self.position = self.window[self.position :] + fresh, 0
        return bool(block)


LONGEST_TOKEN = 16  # characters, more than any that is no error once it is whole: -Infinity, \u escapes
# finds where a value ends, whatever the value is worth
_LENIENT = json.JSONDecoder(parse_float=str, parse_int=str, strict=False)
