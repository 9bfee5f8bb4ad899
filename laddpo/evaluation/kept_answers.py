"""What lm-evaluation-harness was answered, kept as it comes, so that a stopped evaluation can continue.

The harness's own cache is a database of pickles without checks. This one is a log of JSON lines, each with a check:
`{"check": ..., "key": <sha256 of the kind of request and its arguments>, "value": <text, or likelihood>}`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from laddpo.storage.seals import CheckedLines

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class KeptAnswers:
    """Stands before a harness model: requests that `path` holds are answered from there, others are added to it."""

    def __init__(self, path: Path, say: Callable[[str], None] = print):
        self.log = CheckedLines(path, say)
        self.log.rewind(lambda record: record.keys() >= {"key", "value"})
        self.known = {record["key"]: record["value"] for record in self.log.read()}
        if self.known:
            say(f"{path}: {len(self.known)} answers are already there")

    def put_before(self, model: Any) -> None:
        """Let the model answer only what is not known, and give each answer here as soon as it has it."""
        for kind in KINDS:
            setattr(model, kind, functools.partial(self._answer, kind, getattr(model, kind)))
        model.set_cache_hook(self)

    def add_partial(self, kind: str, arguments: Iterable[Any], value: Any) -> None:
        """The harness's name for what a model calls with each answer."""
        key = _key(kind, arguments)
        if key not in self.known:
            self.known[key] = value
            self.log.append({"key": key, "value": value})

    def _answer(self, kind: str, answer: Callable, requests: list, *more: Any, **options: Any) -> list:
        missing = [request for request in requests if _key(kind, request.args) not in self.known]
        found = answer(missing, *more, **options) if missing else []
        for request, value in zip(missing, found, strict=True):
            self.add_partial(kind, request.args, value)
        values = [self.known[_key(kind, request.args)] for request in requests]
        return [tuple(value) if isinstance(value, list) else value for value in values]


def _key(kind: str, arguments: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps([kind, *arguments], default=str).encode()).hexdigest()
