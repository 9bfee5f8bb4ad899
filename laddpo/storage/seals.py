"""How sealed files are read: each one is compared with its seal before its content is used.

A finished folder has a manifest with the sha256 of its files: `sealed_file` compares one file, `require_sealed` all
that a loader would open. What is written before there is a manifest carries its own check: `CheckedLines` for logs
that are continued later, `write_checked` for small JSON files, `with_check` for yaml text.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from laddpo.errors import Damaged, UserError
from laddpo.storage import atomic, json_lines, manifests
from laddpo.storage.manifests import MANIFEST, SEAL

OURS = ("weights", "export")  # kinds of manifest of folders whose files a library's loader opens by name
LINE_HEAD = b'{"check": "'
LINE_TAIL = b'", '
DIGITS = 8  # hex digits of a line's crc32
TEXT_HEAD = "# sha256 of the lines below: "


def sealed_file(folder: Path, name: str) -> Path:
    """The path of this file of `folder`, once its bytes are those that the folder's manifest sealed.

    Raises `Damaged` naming the file. Without a manifest, as in an unfinished folder, nothing is compared. A manifest of
    an earlier version may not name the file: that is one note.
    """
    sealed = sealed_digests(folder)
    if name in sealed:
        _compare(folder, name, sealed[name])
    elif sealed and (folder / name).exists():
        note_once(f"{folder / name}: is not in {MANIFEST} (an earlier version wrote it), so it is read unchecked.")
    return folder / name


def damages(folder: Path) -> list[str]:
    """The problem, if there is one, that a finished folder is no longer what its manifest sealed."""
    try:
        for name in sealed_digests(folder):
            sealed_file(folder, name)
    except UserError as error:
        return list(error.problems)
    return []


def require_if_sealed(path: Path) -> None:
    """Compare a file of any origin with its seal if a manifest of ours beside it names it. Raises `Damaged`."""
    try:
        is_sealed = path.name in sealed_digests(path.parent)
    except UserError:  # a manifest.json that somebody else made
        return
    if is_sealed:
        sealed_file(path.parent, path.name)


def require_sealed(folder: Path, *patterns: str) -> None:
    """Compare the files of `folder` that match `patterns` with its manifest.

    Raises `Damaged` for a file that differs or is gone. In a folder of weights a matching file that the manifest does
    not name is refused: a loader would open it. A manifest.json of another program, or none, means no comparison.
    """
    sealed, manifest = sealed_digests(folder), folder / MANIFEST
    for name, digest in sealed.items():
        if _matches(name, patterns):
            _compare(folder, name, digest)
    if sealed and manifests.unsealed(manifest).get("kind") in OURS:
        there = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
        if added := [name for name in there if name not in sealed and _matches(name, patterns)]:
            raise UserError(
                f"{folder / added[0]}: is not among the files that {MANIFEST} beside it sealed, and loading the folder "
                f"would read it. Remove it; if it was added on purpose, remove {manifest}."
            )


def sealed_digests(folder: Path) -> dict[str, str]:
    """sha256 by name, as the folder's manifest has them; empty without a manifest of ours. No file is compared."""
    manifest = folder / MANIFEST
    content = manifests.unsealed(manifest) if manifest.exists() else None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return {}
    return {name: entry["sha256"] for name, entry in files.items() if isinstance(entry, dict) and "sha256" in entry}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _compare(folder: Path, name: str, digest: str) -> None:
    file = folder / name
    if not file.is_file() or atomic.file_sha256(file) != digest:
        kind = manifests.unsealed(folder / MANIFEST).get("kind")
        cure = manifests.CURES.get(kind, "Copy the folder again from where it is whole.")
        raise Damaged(
            f"{file}: differs from what {MANIFEST} sealed (missing, truncated or changed).",
            f"{cure} If it was changed on purpose, remove {folder / MANIFEST}.",
        )


@functools.cache
def note_once(text: str) -> None:
    """Print a note on stderr the first time this process has it to say."""
    print(f"note: {text}", file=sys.stderr)


def write_checked(path: Path, value: Mapping[str, Any]) -> None:
    """JSON with its own seal, for a file that no manifest names."""
    atomic.write_json(path, manifests.with_seal(value))


def read_checked(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """What `write_checked` wrote. `keys` are all that it may hold. Raises `Damaged` for another content.

    Without a seal it is a file of an earlier version: that is one note.
    """
    content = atomic.read_json(path)
    bare = {name: value for name, value in content.items() if name != SEAL} if isinstance(content, dict) else None
    if bare is None or not bare.keys() <= set(keys) or (SEAL in content and manifests.with_seal(bare) != content):
        raise Damaged(f"{path}: is damaged (its seal does not hold).", "Restore it from a copy, or remove it.")
    if SEAL not in content:
        note_once(f"{path.name} of an earlier version carries no seal, so it is read unchecked.")
    return bare


def with_check(text: str) -> str:
    """The text below a comment with its sha256."""
    return f"{TEXT_HEAD}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def read_checked_text(path: Path) -> str:
    """A text that `with_check` made, whole. Raises `Damaged` when it is not what the comment above it says.

    A text without a comment above it comes from an earlier version or another program: that is one note, unless the
    manifest beside it seals it.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: is damaged ({error}).", "Restore it from a copy.") from error
    body = text.partition("\n")[2]
    has_check = _resembles(text, TEXT_HEAD)
    if has_check and with_check(body) != text:
        raise Damaged(
            f"{path}: differs from what its first line says (truncated or changed).",
            "Restore it from a copy; if it was changed on purpose, remove its first line.",
        )
    if not has_check and path.name not in sealed_digests(path.parent):
        note_once("config.yaml of an earlier version carries no check, so it is read unchecked.")
    return text


class CheckedLines(json_lines.JsonLines):
    """A log of records that is continued later. Each line begins with a crc32 of the rest of it.

    Damaged lines are left out with a note, so that their records are made again. `finish` takes the checks away: a
    manifest seals the file then. A log without any check comes from an earlier version, or was finished before.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print):
        super().__init__(path)
        self.say = say

    def line(self, record: Mapping[str, Any]) -> str:
        """The record as JSON, its check first."""
        text = super().line(record)
        return (LINE_HEAD + _crc(text.encode()) + LINE_TAIL).decode() + text[1:]

    def read(self) -> list[dict]:
        records, left_out, _ = self._examine()
        if left_out:
            self.say(
                f"note: {self.path}: {left_out} of {left_out + len(records)} lines are damaged or incomplete and are "
                "not used; going on makes their records again."
            )
        return records

    def rewind(self, keep) -> None:
        records, _, has_checks = self._examine()
        if records and not has_checks:
            self.say(
                f"note: {self.path}: its lines carry no checks (an earlier version wrote it, or it was finished); they "
                "are used as they are."
            )
        super().rewind(keep)

    def protect(self) -> None:
        """Give every line its check again, before a finished log is added to."""
        if self.path.exists():
            super().rewind(lambda record: True)

    def finish(self) -> None:
        """Rewrite the log without checks. Raises `Damaged` when a line is no longer what was appended."""
        if not self.path.exists():
            return
        records, left_out, _ = self._examine()
        if left_out:
            raise Damaged(f"{self.path}: {left_out} lines were damaged since they were written.", "Run again.")
        atomic.write_text(self.path, "".join(json_lines.JsonLines.line(self, record) for record in records))

    def _examine(self) -> tuple[list[dict], int, bool]:
        """The records, the number of lines that are none, and whether any line has a check."""
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = [line for line in content.split(b"\n") if line]
        has_checks = any(_is_whole(line) for line in lines)
        records = [record for line in lines if (record := _record(line, has_checks)) is not None]
        return records, len(lines) - len(records), has_checks


def _crc(text: bytes) -> bytes:
    """crc32 of a record's line without its line end, as hex digits."""
    return f"{zlib.crc32(text.rstrip()):0{DIGITS}x}".encode("ascii")


def _is_whole(line: bytes) -> bool:
    """Whether the line has a check that holds."""
    end = len(LINE_HEAD) + DIGITS
    body = b"{" + line[end + len(LINE_TAIL) :]
    return line[: end + len(LINE_TAIL)] == LINE_HEAD + _crc(body) + LINE_TAIL


def _record(line: bytes, has_checks: bool) -> dict | None:
    """The record of a line; None for a damaged one. Where other lines have checks, one without is damaged."""
    if (has_checks or _resembles(line, LINE_HEAD)) and not _is_whole(line):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if isinstance(record, dict):
        record.pop("check", None)
    return record if isinstance(record, dict) else None


def _resembles(found, head) -> bool:
    """Whether `found` begins as `head` does, a few flipped bits or a cut aside."""
    return sum(a != b for a, b in zip(found, head, strict=False)) <= 2
