"""Where a training run writes: its two logs, its checkpoints, its weights. Only rank 0 writes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laddpo.storage.json_lines import JsonLines


@dataclass(frozen=True)
class RunOutputs:
    """Where a run writes. `save_best` and `save_last` write the weights; `track` copies scalars to the trackers.

    `pins`: fingerprints of what the run is trained on, for its checkpoints.

    Every rank must call everything, because sharded weights are gathered together. Ranks with writes=False write
    nothing.
    """

    folder: Path
    save_best: Callable[[int], None]
    save_last: Callable[[int], None]
    track: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None
    writes: bool = True
    pins: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> JsonLines:
        """Only reproducible values: two equal runs write equal bytes."""
        return self._lines("metrics.jsonl")

    @property
    def timing(self) -> JsonLines:
        """Clocks, speed and memory."""
        return self._lines("timing.jsonl")

    def _lines(self, name: str) -> JsonLines:
        return JsonLines(self.folder / name) if self.writes else SilentLines(self.folder / name)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


class SilentLines(JsonLines):
    """A log that is not written, because another process writes it or nobody is to: it looks empty, and stays so."""

    def __init__(self, path: Path = Path(os.devnull)):
        super().__init__(path)

    def append(self, record: Mapping[str, Any]) -> None:
        pass

    def read(self) -> list[dict]:
        return []

    def rewrite(self, change) -> None:
        pass

    def sync(self) -> None:
        pass

    def seal(self) -> dict[str, Any]:
        return {}

    def cut(self, sealed: Mapping[str, Any]) -> None:
        pass


def round_folders(run: Path) -> list[Path]:
    """The folders of a run's rounds in their order; none where it has no rounds."""
    numbered = [(re.fullmatch(r"round_([0-9]+)", path.name), path) for path in run.glob("round_*")]
    return [path for _, path in sorted((int(found[1]), path) for found, path in numbered if found)]
