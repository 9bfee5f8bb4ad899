"""Copies of the metrics for people who watch a run: TensorBoard and Weights & Biases, side by side or neither.

metrics.jsonl is the record; what goes out here is a copy that may be late or lost. Each tracker is opened and fed by a
thread of its own, so a slow, blocking or failing one is reported once and neither ends nor slows the run. No key or
token is ever sent: W&B takes its key from WANDB_API_KEY or the netrc file, and the config goes out without secrets.
"""

from __future__ import annotations

import contextlib
import html
import netrc
import numbers
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from laddpo.settings.redaction import redact
from laddpo.storage.atomic import write_text

WANDB_ID_FILE = "wandb_id.txt"
TENSORBOARD_FOLDER = "tensorboard"
EVENTS_WAITING = 10_000  # logged steps that may wait for a slow tracker before they are dropped

Say = Callable[[str], None]


class Tracker(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers that `settings` switches on, as one.

    `folder` is the run's folder; `settings` the logger group (tensorboard, wandb, wandb_project, wandb_name,
    wandb_group, wandb_tags, wandb_mode); `config` the resolved config, recorded beside the curves. `resume_step` is the
    step of the checkpoint a resumed run continues from: TensorBoard hides what the interrupted run logged after it, W&B
    shows those steps twice.
    Call from one process (rank 0) and `close()` at the end, or use it as a context manager.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        resume_step: int | None = None,
        say: Say = print,
    ):
        self._feeds: list[_Feed] = []
        for name, open_tracker in TRACKERS.items():
            if settings.get(name):
                arguments = (folder, dict(settings), _redacted(config), resume_step, say)
                self._feeds.append(_Feed(name, open_tracker, arguments, say))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of `values`; whatever is not a number (None, text, lists) stays in metrics.jsonl alone."""
        scalars = {name: float(value) for name, value in values.items() if _is_number(value) and name != "step"}
        if scalars:
            self._put("scalars", step, scalars)

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, for example sample generations; shown with its line breaks."""
        self._put("text", step, name, text)

    def close(self, timeout_s: float = 60.0) -> None:
        """Deliver what is waiting; a tracker that needs longer than `timeout_s` is left behind, saying so."""
        for feed in self._feeds:
            feed.close(timeout_s)
        self._feeds = []

    def _put(self, method: str, *arguments: Any) -> None:
        for feed in self._feeds:
            feed.put((method, arguments))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Feed:
    """One tracker with its thread and its queue of waiting events."""

    def __init__(self, name: str, open_tracker: Callable[..., Tracker], arguments: tuple, say: Say):
        self._name, self._open, self._arguments, self._say = name, open_tracker, arguments, say
        self._events: queue.Queue = queue.Queue(maxsize=EVENTS_WAITING)
        self._has_failed = False
        self._thread = threading.Thread(target=self._deliver, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, event: tuple) -> None:
        if self._has_failed:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._fail(f"{EVENTS_WAITING} logged events are waiting for it")

    def close(self, timeout_s: float) -> None:
        with contextlib.suppress(queue.Full):
            self._events.put_nowait(None)
        if not self._has_failed:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._fail(f"it did not finish within {timeout_s:g} s")

    def _deliver(self) -> None:
        try:
            tracker = self._open(*self._arguments)
            while not self._has_failed and (event := self._events.get()) is not None:
                method, arguments = event
                getattr(tracker, method)(*arguments)
            tracker.close()
        except BaseException as error:  # a tracker may even call sys.exit; here that ends its own thread alone
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._say(
                f"logger.{self._name} stopped: {redact(reason)}. The run goes on and metrics.jsonl stays complete; "
                f"logger.{self._name}=false switches this off."
            )


class TensorBoardTracker:
    """Event files in <run folder>/tensorboard."""

    def __init__(self, folder: Path, settings: Mapping, config: Mapping, resume_step: int | None, say: Say):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge_step, flush_secs=10)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's code block, safe for any text
        self._writer.add_text(name, indented, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """One W&B run per run folder: its id is stored there before the run opens, so a resumed run continues it.

    Without network or key the run is kept in <run folder>/wandb, for `wandb sync` later. WANDB_MODE in the environment
    wins over `wandb_mode`. Step numbers are a metric of their own, since W&B's internal step cannot go back on resume:
    what it has of a step that is done again stays beside the new one. (Its `resume_from`, in beta, cuts at internal
    steps.)
    """

    def __init__(self, folder: Path, settings: Mapping, config: Mapping, resume_step: int | None, say: Say):
        import wandb

        self._wandb = wandb
        mode = os.environ.get("WANDB_MODE") or settings.get("wandb_mode") or "online"
        if mode == "online" and not has_wandb_key():
            say(
                f"logger.wandb: no API key in WANDB_API_KEY or the netrc file; logging offline to {folder / 'wandb'}. "
                f"`wandb login` then `wandb sync` sends it; logger.wandb_mode=offline chooses this silently."
            )
            mode = "offline"
        self._run = wandb.init(
            project=settings.get("wandb_project") or "laddpo",
            name=settings.get("wandb_name") or folder.name,
            group=settings.get("wandb_group"),
            tags=list(settings.get("wandb_tags") or []),
            config=dict(config),
            dir=str(folder),
            id=wandb_id(folder),
            resume="allow",
            mode=mode,
            save_code=False,
            settings=wandb.Settings(
                disable_code=True, disable_git=True, console="off", quiet=True, silent=mode != "online", init_timeout=60
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        shown = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self._run.log({name: self._wandb.Html(shown, inject=False), "step": step})

    def close(self) -> None:
        self._run.finish()


def wandb_id(folder: Path) -> str:
    """The W&B run id of a run folder; made and stored at the first call."""
    path = folder / WANDB_ID_FILE
    if path.exists() and (stored := path.read_text(encoding="utf-8").strip()):
        return stored
    made = secrets.token_hex(4)
    write_text(path, made + "\n")
    return made


def _redacted(value: Any) -> Any:
    """A plain copy of a config tree with every credential taken out of its texts."""
    if isinstance(value, Mapping):
        return {str(key): _redacted(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def has_wandb_key() -> bool:
    """Whether WANDB_API_KEY, or the netrc file for W&B's host, holds a key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    names = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for name in names:
        try:
            if netrc.netrc(os.path.expanduser(name)).authenticators(host or ""):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}
