"""Copies of the metrics for people who watch a run, in any number of trackers side by side, or in none.

metrics.jsonl is the record; the trackers get copies that may be late or lost. Each tracker is opened and fed by a
thread of its own, so a slow, blocking or failing one is reported once and neither ends nor slows the run. No key or
token is ever sent: each tracker takes its key from the environment or its own file, and the config is sent without
secrets.
"""

from __future__ import annotations

import numbers
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laddpo.settings.redaction import redact
from laddpo.training.tracker_opening import Opening, Say
from laddpo.training.trackers import TRACKERS

EVENTS_WAITING = 10_000  # logged steps that may wait for a slow tracker before it is given up
SWITCHES = ("tensorboard", "wandb")  # each has a setting of its own


class Trackers:
    """The trackers of `names`, as one.

    `folder` is the run's folder; `settings` the logger group (project, name, group, tags, and W&B's own); `config` the
    resolved config, recorded beside the curves. `resume_step` is the step of the checkpoint a resumed run continues
    from: TensorBoard hides what the interrupted run logged after it, the others keep those steps twice.
    Call from one process (rank 0) and `close()` at the end, or use it as a context manager.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        resume_step: int | None = None,
        say: Say = print,
    ):
        opening = Opening(folder, settings, _redacted(config), resume_step, say)
        self._feeds = [_Feed(name, TRACKERS[name], opening) for name in names]

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of `values`; whatever is not a number (None, text, lists) stays in metrics.jsonl alone."""
        scalars = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, numbers.Real) and not isinstance(value, bool) and name != "step"
        }
        for feed in self._feeds if scalars else ():
            feed.put("scalars", step, scalars)

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, for example sample generations; shown with its line breaks."""
        for feed in self._feeds:
            feed.put("text", step, name, text)

    def close(self, timeout_s: float = 60.0) -> None:
        """Deliver what is waiting; a tracker that needs longer than `timeout_s` is left behind, saying so."""
        for feed in self._feeds:
            feed.close(timeout_s)
        self._feeds = []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Feed(threading.Thread):
    """Opens one tracker and delivers the events of a queue to it. As a daemon it never keeps a process alive."""

    def __init__(self, name: str, open_tracker: Callable[[Opening], Any], opening: Opening):
        super().__init__(name=name, daemon=True)
        self._open, self._opening, self._say = open_tracker, opening, opening.say
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._has_failed, self._failing = False, threading.Lock()
        self.start()

    def put(self, *event: Any) -> None:
        if not self._has_failed:
            self._events.put(event)
            if self._events.qsize() >= EVENTS_WAITING:
                self._fail(f"{EVENTS_WAITING} logged events are waiting for it")

    def close(self, timeout_s: float) -> None:
        with self._failing:  # what is being said is said to its end
            is_fed = not self._has_failed
        if is_fed:
            self._events.put(None)
            self.join(timeout_s)
            if self.is_alive():
                self._fail(f"it did not finish within {timeout_s:g} s")

    def run(self) -> None:
        try:
            tracker = self._open(self._opening)
            while not self._has_failed and (event := self._events.get()):
                method, *arguments = event
                getattr(tracker, method)(*arguments)
            tracker.close()
        except BaseException as error:  # a tracker may even call sys.exit; here that ends its own thread alone
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        with self._failing:
            if self._has_failed:
                return
            self._has_failed = True
            has_switch = self.name in SWITCHES
            off = f"logger.{self.name}=false" if has_switch else f"logger.trackers without {self.name}"
            self._say(
                f"logger.{self.name} stopped: {redact(reason)}. The run continues and metrics.jsonl stays complete; "
                f"{off} switches this off."
            )


def log_results(trackers: Trackers, results: Mapping[str, Any], step: int) -> None:
    """The final evaluation as result/exact_match and so on. results.json is the record."""
    tuned = {
        f"result/{name}": entry["tuned"]
        for name, entry in results.items()
        if isinstance(entry, Mapping) and "tuned" in entry
    }
    trackers.scalars(step, tuned)


def _redacted(value: Any) -> Any:
    """A plain copy of a config tree with every credential taken out of its texts."""
    if isinstance(value, Mapping):
        return {str(key): _redacted(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value
