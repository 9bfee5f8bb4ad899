"""A benchmark that ends in time: what it measured until then is kept, and a second call measures what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from laddpo.settings.schema import StepSetting

T = TypeVar("T", int, StepSetting)


class TimeUp(Exception):
    """The minutes of the benchmark are over."""


@dataclass
class Clock:
    """`minutes` from now; None: no end."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return self._left() <= 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Work that `TimeUp` ends when the time is over, wherever it is. Where the system has no such signal, the time
        is looked at between parts alone."""
        if self.minutes is None or not hasattr(signal, "setitimer"):
            yield
            return

        def ring(number: int, frame: object) -> None:
            raise TimeUp

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(self._left(), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _left(self) -> float:
        return float("inf") if self.minutes is None else 60 * self.minutes - (time.monotonic() - self.started)


@dataclass
class Rows:
    """The rows of a part that measures one setting after the other. `kept`: those of an earlier call; `save` is given
    all rows after each new one."""

    kept: Sequence[Mapping[str, Any]] = ()
    save: Callable[[list[dict]], None] = lambda rows: None
    is_cut: bool = False

    def measured(self, settings: Sequence[T], row_of: Callable[[T], dict]) -> list[dict]:
        """A row for each setting, kept or measured, until the time is up. A setting is a number or a dataclass."""
        found: list[dict] = []
        for setting in settings:
            name = setting if isinstance(setting, int) else dataclasses.asdict(setting)
            try:
                known = next((dict(row) for row in self.kept if row["setting"] == name), None)
                row = known or {"setting": name, **row_of(setting)}
            except TimeUp:
                self.is_cut = True
                break
            found.append(row)
            self.save(found)
        return found
