"""Verdicts and scores on disk, so that nothing is judged twice: a log of JSON lines, each with a check."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laddpo.storage import atomic, manifests
from laddpo.storage.seals import CheckedLines

KIND, LOG, ABOUT = "judged", "judged.jsonl", "judge.json"


class Kept:
    """What one judge has said, by a key of what it was asked. `fields` are what its words depend on.

    A torn or damaged line is left out, and what it said is asked again.
    """

    def __init__(self, data_dir: Path, fields: Mapping[str, Any], say: Callable[[str], None] = print):
        self.folder = Path(data_dir) / KIND / manifests.fingerprint(fields)
        self.log = CheckedLines(self.folder / LOG, say)
        self.known = {record["key"]: record for record in self.log.read() if "key" in record}
        if not (self.folder / ABOUT).exists():
            atomic.write_json(self.folder / ABOUT, dict(fields))
        if self.log.path.exists() and not self.log.path.read_bytes().endswith(b"\n"):
            self.log.rewind(lambda record: True)  # without the torn line, so that the next one begins its own

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of that key, if there is one."""
        return self.known.get(key)

    def add(self, key: str, **said: Any) -> None:
        """Keep what the judge said, at once."""
        self.known[key] = {"key": key, **said}
        self.log.append(self.known[key])


def key_of(value: Any) -> str:
    """The key of what a judge is asked."""
    return hashlib.sha256(atomic.canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()
