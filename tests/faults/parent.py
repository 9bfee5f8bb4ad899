"""A warmed process that forks one child for every run of a stage: a run costs tenths of a second instead of ten.

    python -m tests.faults.parent <folder>

One JSON request a line on stdin, one JSON reply a line on stdout. A request names the stage, the folder in which it
works, overrides, and what shall happen to it: a plan for laddpo's writing calls, or signals at given seconds.
What is cut out of a run for speed: composing the settings (done once here) and drawing figures (fixed bytes instead).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from hydra.types import RunMode
from tqdm import tqdm

from laddpo.errors import UserError
from laddpo.settings.read_settings import stage_reads
from tests.tiny import write_tiny_model

SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 32}
STEPS = 3
QUICK = [
    *[f"model.shape.{name}={value}" for name, value in SHAPE.items()],
    *("paths.data_dir=data", "hardware.device=cpu", "logger=none", "data.num_pairs=6", "data.max_length=512"),
    *("data.validation_fraction=0.34", "dpo.diffusion_samples=2", "optim.per_device_train_batch_size=2"),
    *("optim.learning_rate=1e-2", "optim.num_warmup_steps=0", f"optim.max_train_steps={STEPS}", "save_steps=1"),
    *("logging_steps=1", "evaluation.every_steps=2", "evaluation.limit=1", "evaluation.num_pairs=2"),
    *(
        "evaluation.diffusion_samples=2",
        "evaluation.gen_length=4",
        "evaluation.block_length=4",
        "evaluation.steps=2",
        "evaluation.confidence_threshold=null",
    ),
    *("evaluation.samples=1", "best_metric=loss"),
]
BARE = "bare"  # as the first override: none but those that follow
OF_STAGE = {"train": ["evaluation.batch_size=1", "output_dir=run", "resume=true"]}
FIGURE = b"a figure"
POLITE = (signal.SIGTERM, signal.SIGINT)


class Parent:
    """Runs stages in children. `folder` holds the model and is where logs go."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = write_tiny_model(folder / "model", SHAPE)
        self.trees: dict[str, object] = {}
        self.count = 0

    def warm(self) -> None:
        """Import and run everything once here, so that no child has to; and put the cheap parts in place."""
        import torch

        torch.set_num_threads(1)
        from laddpo.results import figures

        figures.save_png = _draw_nothing  # before the modules that draw take it from there
        from laddpo import train
        from laddpo.cli import app
        from laddpo.preference import preparation
        from laddpo.results import plots

        preparation.report_figure = lambda content: FIGURE
        for name in ("training_plot", "evaluation_plot"):
            setattr(plots, name, _draw_nothing)
        here, place = os.getcwd(), self.folder / "warm"
        place.mkdir()
        os.chdir(place)
        assert app.cli("train", self.arguments("train", []), train.main) == 0, "the undisturbed run failed"
        os.chdir(here)
        self.compose, app.compose_tree = app.compose_tree, self.composed

    def arguments(self, stage: str, more: list[str]) -> list[str]:
        if more[:1] == [BARE]:
            return more[1:]
        is_read = {"data.num_pairs": "data=onpolicy" not in more}
        quick = [text for text in QUICK if stage_reads(stage, text) and is_read.get(text.partition("=")[0], True)]
        return [f"model.model_name_or_path={self.model}", *quick, *OF_STAGE.get(stage, []), *more]

    def composed(self, hydra, config_name, overrides, mode=RunMode.RUN):
        """The tree of these overrides, composed once."""
        key = json.dumps(list(overrides))
        if key not in self.trees:
            self.trees[key] = self.compose(hydra, config_name, overrides, mode)
        return self.trees[key]

    def prepare_settings(self, stage: str, more: list[str]) -> None:
        from laddpo.cli import app
        from laddpo.cli import arguments as command_line

        with app.open_hydra(f"laddpo.{stage}", None) as hydra, contextlib.suppress(UserError):
            args = command_line.parse(stage, self.arguments(stage, more))
            self.composed(hydra, args.config_name, args.overrides, command_line.mode_of(args))

    def run(self, request: dict) -> dict:
        """One run of a stage: its exit code (negative: the signal that ended it), seconds and log."""
        stage, more = request["stage"], request.get("overrides", [])
        self.prepare_settings(stage, more)
        self.count += 1
        log, calls = self.folder / f"{self.count}.log", self.folder / f"{self.count}.calls"
        started = time.monotonic()
        log.touch()
        signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)
        child = os.fork()
        if child == 0:
            self.be_child(stage, more, request, log, calls)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, POLITE)
        status = None
        for at, name in request.get("signals", []):
            while status is None and time.monotonic() - started < at:
                status = _poll(child)
                time.sleep(0.0005)
            if status is None:
                os.kill(child, getattr(signal, name))
        while status is None and time.monotonic() - started < request.get("limit", 60):
            status = _poll(child)
            time.sleep(0.0005)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = "it hung"
        seconds = time.monotonic() - started
        reply = {"status": status, "seconds": seconds, "log": log.read_text(errors="replace"), "calls": []}
        if calls.exists():
            if isinstance(status, int) and status >= 0:  # a killed child may have left half of it
                reply["calls"] = json.loads(calls.read_text())
            calls.unlink()
        log.unlink()
        return reply

    def be_child(self, stage: str, more: list[str], request: dict, log: Path, calls: Path) -> None:
        """Never returns, whenever a signal comes."""
        code = 75  # what an interrupt outside of the stage makes of it
        try:
            code = self.be_stage(stage, more, request, log, calls)
        except KeyboardInterrupt:
            pass
        finally:
            os._exit(code)

    def be_stage(self, stage: str, more: list[str], request: dict, log: Path, calls: Path) -> int:
        """In the child: run the stage as its own process would; its exit code."""
        code = 1
        try:
            tqdm.set_lock(threading.RLock())  # its own is shared with the children before: one killed in it blocks all
            for number in POLITE:  # as the door of every stage has them, also where this process ignores SIGINT
                signal.signal(number, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, POLITE)
            out = os.open(log, os.O_WRONLY | os.O_CREAT)
            for fd in (1, 2):
                os.dup2(out, fd)
            if request.get("reader_gone"):
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, 1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(request["folder"])
            import importlib

            from laddpo.cli import app
            from tests.faults import crash_points, numbers, sealed

            main = importlib.import_module(f"laddpo.{stage}").main
            if "stand_ins" in request:
                sealed.install(request["stand_ins"])
            if "numbers" in request:
                numbers.install(request["numbers"])
            for what, most in request.get("limits", []):
                resource.setrlimit(what, (most, most))
            points = crash_points.install(Path(request["folder"]), request.get("plan"))
            code = app.cli(stage, self.arguments(stage, more), main)
            signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)  # the stage is over: what follows is the bench's own
            points.write_calls(calls)
            sys.stdout.flush()
            sys.stderr.flush()
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)
        return code


def _poll(child: int):
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _draw_nothing(*args, **kwargs) -> None:
    from laddpo.storage.atomic import write_bytes

    path = next(value for value in [*args, *kwargs.values()] if isinstance(value, Path))
    write_bytes(path, FIGURE)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a stage prints goes to stderr
    parent = Parent(Path(sys.argv[1]))
    parent.warm()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(parent.run(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
