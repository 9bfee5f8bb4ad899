"""A log for the processes of a run that do not write: they compute what rank 0 computes, and rank 0 alone keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laddpo.runs import JsonLines


class SilentLines(JsonLines):
    """Looks like a log that is empty, and stays so."""

    def append(self, record: Mapping[str, Any]) -> None:
        pass

    def read(self) -> list[dict]:
        return []

    def rewind(self, keep) -> None:
        pass

    def seal(self) -> dict[str, Any]:
        return {}

    def cut(self, sealed: Mapping[str, Any]) -> None:
        pass
