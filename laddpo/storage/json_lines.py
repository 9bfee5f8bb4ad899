"""A file of JSON lines that is appended to and read again after a stop."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.storage.atomic import (
    explained,
    file_sha256,
    sync_file,
    write_bytes,
    write_text,
)
from laddpo.storage.locks import open_own


class JsonLines:
    """An append-only log of one JSON object per line, in which a torn last line can only come from a crash.

    `seal()` makes what is there durable and describes it; a run that continues from a checkpoint gives that back to
    `cut`, which drops every later record and refuses a file whose earlier ones are no longer the same bytes.
    """

    def __init__(self, path: Path):
        self.path = path

    def line(self, record: Mapping[str, Any]) -> str:
        """The record as the log has it."""
        return json.dumps(record, allow_nan=False) + "\n"

    def append(self, record: Mapping[str, Any]) -> None:
        line = self.line(record)
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with open(fd, "a", encoding="utf-8", newline="\n") as f:
                f.write(line)

    def read(self) -> list[dict]:
        """All records before the first line that is none."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_bytes().split(b"\n"):
            if line:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
        return records

    def rewind(self, keep) -> None:
        """Drop a torn last line and every record for which `keep(record)` is false."""
        self.rewrite(lambda record: record if keep(record) else None)

    def rewrite(self, change: Callable[[dict], Mapping[str, Any] | None]) -> None:
        """Put `change(record)` in the place of every record, or nothing for None: all of them at once, or none."""
        changed = [change(record) for record in self.read()]
        write_text(self.path, "".join(self.line(record) for record in changed if record is not None))

    def sync(self) -> None:
        """Make what was appended durable: a power cut takes no record that others rely on."""
        if self.path.exists():
            with explained(self.path):
                sync_file(self.path)

    def seal(self) -> dict[str, Any]:
        """Size and sha256 of the log as it is now, and on disk."""
        if not self.path.exists():
            return {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        self.sync()
        return {"bytes": self.path.stat().st_size, "sha256": file_sha256(self.path)}

    def cut(self, sealed: Mapping[str, Any]) -> None:
        """Cut the log back to what `seal` described. A missing log is reported; a changed one raises `UserError`."""
        size = sealed["bytes"]
        if size and not self.path.exists():
            print(f"{self.path}: is missing; going on without the records of the steps before.")
            return
        write_bytes(self.path, self.require(sealed))

    def require(self, sealed: Mapping[str, Any]) -> bytes:
        """The bytes that `seal` described; `UserError` when the log no longer begins with them."""
        content = self.path.read_bytes()[: sealed["bytes"]] if sealed["bytes"] else b""
        if hashlib.sha256(content).hexdigest() != sealed["sha256"]:
            raise UserError(
                f"{self.path}: differs from what the checkpoint sealed (truncated or changed). Restore it, or remove "
                "it to continue without the records of the steps before."
            )
        return content
