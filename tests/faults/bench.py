"""What the fault tests share: a warmed parent that runs stages, undisturbed results, and the comparison with them."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("prepare", "precompute", "train")
NOT_COMPARED = (".lock", "timing.jsonl")  # who holds a folder, and clocks


@dataclass
class Outcome:
    """How a run ended: its exit code or minus the signal, what it printed, its numbered writing calls."""

    status: int | str
    log: str
    calls: list[list[str]]
    seconds: float

    @property
    def was_killed(self) -> bool:
        return self.status == -9


@dataclass
class Tally:
    """One line of the table: what was done, how often, and what came of it."""

    what: str
    stage: str = ""
    runs: int = 0
    faults: int = 0
    differences: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""


def table(tallies: Sequence[Tally]) -> str:
    """The table of everything done, as Markdown."""
    rows = [("what", "stage", "runs", "faults", "differences", "silent", "seconds", "")]
    for line in tallies:
        wrong = [str(len(line.differences)), str(len(line.silent))]
        rows.append((line.what, line.stage, str(line.runs), str(line.faults), *wrong, f"{line.seconds:.0f}", line.note))
    totals = [sum(getattr(line, name) for line in tallies) for name in ("runs", "faults")]
    wrongs = [sum(len(getattr(line, name)) for line in tallies) for name in ("differences", "silent")]
    seconds = sum(line.seconds for line in tallies)
    rows.append(("all", "", *(str(number) for number in [*totals, *wrongs]), f"{seconds:.0f}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = range(2, 7)
    shown = [
        "| "
        + " | ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = (
        "|"
        + "|".join("-" * (width + 1) + (":" if column in numbers else "-") for column, width in enumerate(widths))
        + "|"
    )
    return "\n".join([shown[0], rule, *shown[1:]])


class Bench:
    """Folders in which stages run, and what they hold after an undisturbed run."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "TMPDIR": str(folder),
        }
        self.log = (folder / "parent.log").open("wb")
        command = [sys.executable, "-m", "tests.faults.parent", str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.parent = subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)
        self._numbers = itertools.count()
        self.answer()
        self.before: dict[str, Path] = {}
        self.after: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, list[list[str]]] = {}
        self.seconds: dict[str, float] = {}
        here = self.new_folder()
        for stage in STAGES:
            self.before[stage] = here
            here = self.new_folder(here)
            outcome = self.run(stage, here)
            assert outcome.status == 0, f"the undisturbed {stage} failed:\n{outcome.log}"
            self.after[stage], self.calls[stage] = snapshot(here), outcome.calls
            self.seconds[stage] = outcome.seconds
        self.done = here

    def answer(self) -> dict:
        ready, _, _ = select.select([self.parent.stdout], [], [], 300)
        line = self.parent.stdout.readline() if ready else ""
        assert line, "the parent ended, or says nothing:\n" + (self.folder / "parent.log").read_text()[-4000:]
        return json.loads(line)

    def run(self, stage: str, folder: Path, **request: Any) -> Outcome:
        """Run a stage in `folder`. See tests/faults/parent.py for what a request may hold."""
        request = {"stage": stage, "folder": str(folder), **request}
        self.parent.stdin.write(json.dumps(request) + "\n")
        self.parent.stdin.flush()
        reply = self.answer()
        return Outcome(reply["status"], reply["log"], reply["calls"], reply["seconds"])

    def new_folder(self, like: Path | None = None) -> Path:
        folder = self.folder / f"work-{next(self._numbers)}"
        if like is None:
            folder.mkdir()
        else:
            shutil.copytree(like, folder, symlinks=True)
        return folder

    def start(self, stage: str) -> Path:
        """A folder in which everything before `stage` is done."""
        return self.new_folder(self.before[stage])

    def finish(self, stage: str, folder: Path, where: str, tally: Tally) -> None:
        """Go on to the end, undisturbed; compare, and remove the folder."""
        outcome = self.run(stage, folder)
        if outcome.status != 0:
            tally.silent.append(f"{where}: not continued, exit code {outcome.status}: {outcome.log[-1500:]}")
        tally.runs += 1
        tally.differences += [f"{where}: {line}" for line in differences(snapshot(folder), self.after[stage])]
        self.remove(folder)

    def undisturbed(self, stage: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """What the stage leaves under other settings."""
        if not overrides:
            return self.after[stage]
        folder = self.start(stage)
        outcome = self.run(stage, folder, overrides=list(overrides))
        assert outcome.status == 0, f"the undisturbed {stage} failed:\n{outcome.log}"
        return snapshot(folder)

    def remove(self, folder: Path) -> None:
        shutil.rmtree(folder)

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait(30)
        self.log.close()


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file below `folder` by its path: bytes; of a manifest, all but the provenance and what it seals of it."""
    return {str(file.relative_to(folder)): content(file) for file in sorted(folder.rglob("*")) if is_compared(file)}


def is_compared(file: Path) -> bool:
    return file.name not in NOT_COMPARED and file.is_file()


def content(file: Path) -> Any:
    if file.name != "manifest.json":
        return file.read_bytes()
    manifest = json.loads(file.read_bytes())
    assert isinstance(manifest, dict), f"{file} holds {manifest!r}"
    return {key: value for key, value in manifest.items() if key not in ("provenance", "seal")}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The files that differ, are missing, or should not be there."""
    return [
        f"{name} ({'missing' if name not in found else 'left over' if name not in wanted else 'differs'})"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def with_stores_as_values(found: dict[str, Any]) -> dict[str, Any]:
    """Stores by what they say instead of by their shards: a stopped precompute leaves smaller ones."""
    from safetensors.numpy import load

    kept: dict[str, Any] = {}
    for name, data in found.items():
        folder, _, file = name.rpartition("/")
        if not folder.startswith("data/reference/"):
            kept[name] = data
        elif file == "manifest.json":
            kept[name] = {key: value for key, value in data.items() if key != "shards"}
        else:
            shard = load(data)
            for pair, digest, values in zip(shard["ids"], shard["digests"], shard["values"], strict=True):
                for draw, value in enumerate(values.T, int(shard["first_draw"][0])):
                    kept[f"{folder}: {bytes(pair).decode()} {bytes(digest).hex()} {draw}"] = value.tobytes()
    return kept
