"""Copies of the metrics for people who watch a run: TensorBoard and Weights & Biases, side by side or neither.

metrics.jsonl is the record; the trackers get copies that may be late or lost. Each tracker is opened and fed by a
thread of its own, so a slow, blocking or failing one is reported once and neither ends nor slows the run. No key or
token is ever sent: W&B takes its key from WANDB_API_KEY or the netrc file, and the config is sent without secrets.
"""

from __future__ import annotations

import html
import numbers
import os
import queue
import secrets
import shlex
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laddpo.settings.redaction import redact
from laddpo.storage.atomic import write_text

EVENTS_WAITING = 10_000  # logged steps that may wait for a slow tracker before it is given up
MAIN_SETTINGS = ("model.name", "data.source", "dpo", "optim", "adapter.kind", "adapter.r", "hardware.precision", "seed")
COMPARED = (  # columns of results on TensorBoard's HPARAMS page
    *("loss", "validation/loss", "validation/exact_match", "validation/rewards/accuracies"),
    *("result/exact_match", "result/reward_accuracy", "result/held_out_loss"),
)
WANDB_ID_FILE = "wandb_id.txt"
TENSORBOARD_FOLDER = "tensorboard"

Say = Callable[[str], None]


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
        arguments = (folder, settings, _redacted(config), resume_step, say)
        self._feeds = [_Feed(name, TRACKERS[name], arguments, say) for name in TRACKERS if settings.get(name)]

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

    def __init__(self, name: str, open_tracker: Callable[..., Any], arguments: tuple, say: Say):
        super().__init__(name=name, daemon=True)
        self._open, self._arguments, self._say = open_tracker, arguments, say
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._has_failed = False
        self.start()

    def put(self, *event: Any) -> None:
        if not self._has_failed:
            self._events.put(event)
            if self._events.qsize() >= EVENTS_WAITING:
                self._fail(f"{EVENTS_WAITING} logged events are waiting for it")

    def close(self, timeout_s: float) -> None:
        if not self._has_failed:
            self._events.put(None)
            self.join(timeout_s)
            if self.is_alive():
                self._fail(f"it did not finish within {timeout_s:g} s")

    def run(self) -> None:
        try:
            tracker = self._open(*self._arguments)
            while not self._has_failed and (event := self._events.get()):
                method, *arguments = event
                getattr(tracker, method)(*arguments)
            tracker.close()
        except BaseException as error:  # a tracker may even call sys.exit; here that ends its own thread alone
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._say(
                f"logger.{self.name} stopped: {redact(reason)}. The run continues and metrics.jsonl stays complete; "
                f"logger.{self.name}=false switches this off."
            )


class TensorBoardTracker:
    """Event files in <run folder>/tensorboard, with the main settings for its HPARAMS page.

    `SummaryWriter.add_hparams` would open a run of its own below the folder; the same summaries are written here into
    the run's own file.
    """

    def __init__(self, folder: Path, settings: Mapping, config: Mapping, resume_step: int | None, say: Say):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge_step, flush_secs=10)
        begin, start, self._end = hparams(main_settings(config), dict.fromkeys(COMPARED, 0))
        for summary in (begin, start):
            self._writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's code block, safe for any text
        self._writer.add_text(name, indented, step)

    def close(self) -> None:
        self._writer.file_writer.add_summary(self._end)
        self._writer.close()


def main_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the HPARAMS page compares runs by: MAIN_SETTINGS of the config, by dotted name, as numbers and texts."""
    found: dict[str, Any] = {}
    for name in MAIN_SETTINGS:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        settings = (
            {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        for key, inner in settings.items():
            if inner is not None:
                found[key] = inner if isinstance(inner, (bool, int, float, str)) else str(inner)
    return found


def log_results(folder: Path, is_wanted: bool, results: Mapping[str, Any], step: int, say: Say = print) -> None:
    """The final evaluation in TensorBoard, as result/exact_match and so on. results.json is the record."""
    values = {
        name: entry["tuned"] for name, entry in results.items() if isinstance(entry, Mapping) and "tuned" in entry
    }
    if not (is_wanted and values):
        return
    try:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / TENSORBOARD_FOLDER)) as writer:
            for name, value in values.items():
                writer.add_scalar(f"result/{name}", value, step)
    except Exception as error:  # as of every tracker: the run has its results without it
        say(f"logger.tensorboard has no final results: {redact(f'{type(error).__name__}: {error}')}")


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
                "`wandb login` stores a key; logger.wandb_mode=offline chooses this without a note."
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
        self._say, self._is_offline = say, mode == "offline"
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        shown = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self._run.log({name: self._wandb.Html(shown, inject=False), "step": step})

    def close(self) -> None:
        place = Path(self._run.sync_dir).absolute()
        self._run.finish()
        if self._is_offline:
            self._say(f"W&B kept this run offline. To send it: wandb sync {shlex.quote(str(place))}")


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
    from requests.utils import get_netrc_auth  # comes with wandb

    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(address))


# each has scalars(step, values), text(step, name, text) and close()
TRACKERS: dict[str, Callable[..., Any]] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}
