"""Rows that were read, kept in a temporary file, with what sampling, splitting and ordering need of each in memory."""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laddpo.preference.reading.pairs import (
    Example,
    PreferencePair,
    Prompt,
    UnpairedRow,
    content_digest,
    labelled_digest,
    prompt_group,
    prompt_of,
    prompt_rows,
)

DIGEST_BYTES = 12


@dataclass(frozen=True)
class SpooledRow:
    """A row as it was read; `index` is its place in the order of content."""

    index: int
    prompt: Prompt
    responses: tuple[str, ...]
    place: str
    group: str
    answer: str | None
    label: bool | None = None
    weight: float = 1.0
    margin: float = 0.0


class Spool:
    """`add` rows in any order; everything after that is in the order of their content.

    Arrays over rows, in content order once `sort` was called: `digests` S12, `occurrences` (0 for the first of equal
    rows), `groups` uint64 (keys of prompts), `parts` (which of several sources), `labels` int8 (of an unpaired row 1
    if its completion is desirable, else 0; of other rows -1).
    """

    def __init__(self, folder: Path, sides: Sequence[str]):
        self._sides = tuple(sides)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `close`, has no name)
        self._positions = array("q")
        self._digests, self._mirrored = bytearray(), bytearray()
        self._groups, self._parts, self._labels = array("Q"), array("B"), array("b")
        self._weights, self._margins = array("d"), array("d")

    def __len__(self) -> int:
        return len(self._positions)

    def add(self, row: PreferencePair | UnpairedRow | Example, part: int) -> None:
        responses = [getattr(row, side) for side in self._sides]
        group = prompt_group(row.prompt) if isinstance(row, Example) else row.group
        extra = [getattr(row, "weight", 1.0), getattr(row, "margin", 0.0)]
        record = [prompt_rows(row.prompt), responses, row.source, group, getattr(row, "answer", None), *extra]
        self._positions.append(self._file.tell())
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        self._digests += bytes.fromhex(row.id.partition("-")[0])
        if len(responses) == 2:
            self._mirrored += bytes.fromhex(content_digest(row.prompt, *responses[::-1]))
        if isinstance(row, UnpairedRow):
            self._mirrored += bytes.fromhex(labelled_digest(row.prompt, row.completion, not row.label))
        self._labels.append(int(row.label) if isinstance(row, UnpairedRow) else -1)
        self._groups.append(int(group, 16))
        self._parts.append(part)
        self._weights.append(extra[0])
        self._margins.append(extra[1])

    def sort(self) -> None:
        """Put rows in the order of their content and number equal ones."""
        self._file.flush()
        digests = np.frombuffer(bytes(self._digests), dtype=f"V{DIGEST_BYTES}")
        keys = np.frombuffer(bytes(self._digests), dtype=">u4").reshape(-1, 3)
        extra = (np.frombuffer(self._margins), np.frombuffer(self._weights))  # so that equal rows have one order
        order = np.lexsort((*extra, keys[:, 2], keys[:, 1], keys[:, 0]))
        self._order = order
        self.digests = digests[order]
        self.groups = np.frombuffer(self._groups, dtype=np.uint64)[order]
        self.parts = np.frombuffer(self._parts, dtype=np.uint8)[order]
        self.labels = np.frombuffer(self._labels, dtype=np.int8)[order]
        self._places = np.frombuffer(self._positions, dtype=np.int64)[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = self.digests[1:] != self.digests[:-1]
        start = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
        self.occurrences = np.arange(len(order)) - start

    def row_id(self, row: int) -> str:
        """The id of a row: digest of its content and occurrence number."""
        return f"{self.digests[row].tobytes().hex()}-{self.occurrences[row]}"

    def keyed_positions(self, seed: int, rows: np.ndarray) -> np.ndarray:
        """uint64 per row: a pseudo-random position that depends on the row's content and the seed alone."""
        return np.array([keyed_position(seed, self.row_id(int(row))) for row in rows], dtype=np.uint64)

    def repeats(self, rows: np.ndarray) -> np.ndarray:
        """bool [rows]: whether a row, of some in content order, has the content of the one before."""
        digests = self.digests[rows]
        return np.append(False, digests[1:] == digests[:-1])[: len(rows)]

    def contradictions(self, rows: np.ndarray) -> int:
        """How many of the rows have the same prompt and the same two responses as another, the other way round; of
        unpaired rows the same completion with the other label."""
        return int((self.opposites(rows) >= 0).sum())

    def opposites(self, rows: np.ndarray) -> np.ndarray:
        """int64 [rows]: for each of the rows the index of one that says the opposite; -1 where none of them does."""
        if not self._mirrored:
            return np.full(len(rows), -1)
        kind = f"S{DIGEST_BYTES}"
        mirrored = np.frombuffer(bytes(self._mirrored), dtype=kind)[self._order][rows]
        digests = self.digests[rows].view(kind)  # in order, as rows are
        found = np.minimum(np.searchsorted(digests, mirrored), len(rows) - 1)
        return np.where(digests[found] == mirrored, rows[found], -1)

    def place(self, row: int) -> str:
        """Where a row was read."""
        return next(self.read(np.array([row]))).place

    def read(self, rows: np.ndarray) -> Iterator[SpooledRow]:
        """The rows asked for, in that order."""
        for index in rows:
            self._file.seek(self._places[index])
            prompt, responses, place, group, answer, *extra = json.loads(self._file.readline())
            label = None if self.labels[index] < 0 else bool(self.labels[index])
            yield SpooledRow(int(index), prompt_of(prompt), tuple(responses), place, group, answer, label, *extra)

    def close(self) -> None:
        self._file.close()


def keyed_position(seed: int, key: str) -> int:
    """A uniform integer below 2**64 that is a function of seed and key."""
    return int.from_bytes(hashlib.blake2b(f"laddpo sample/{seed}/{key}".encode(), digest_size=8).digest(), "big")
