"""One warmed parent for all fault tests, and the table of what they did."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.bench import Bench, Tally, table

if sys.platform != "linux":  # forks, /proc and limits as Linux has them
    collect_ignore_glob = ["test_*.py"]

TALLIES = pytest.StashKey[list]()  # lines of the table, in the order of the tests

REPORT = """# Faults

    python -m pytest -m faults --faults-report data/measurements/faults.md

Stages run in children of a warmed process, with a model of two blocks of width 16, four training pairs and three steps.
A fault is a kill, a power cut, a signal, a full disk, a damaged file or a number that is not finite. After it the same
command goes on to its end, where every file is compared with that of an undisturbed run, byte for byte (of manifests
all but provenance; not timing.jsonl; figures are replaced by fixed bytes). After a crash at a call, a second run dies
at another call, chosen at random, before the last one finishes. *silent* counts faults that were not noticed or not
explained: a damaged file that was read, an exit code other than the documented one, a traceback.

A power cut is a kill that also takes away everything written and never synced; renames are kept.

{table}

{machine}
"""


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print the table; with --faults-report, write it with what it means."""
    lines = config.stash.get(TALLIES, [])
    if lines:
        terminalreporter.section("faults")
        terminalreporter.write_line(table(lines))
    if lines and (path := config.getoption("--faults-report")):
        Path(path).write_text(REPORT.format(table=table(lines), machine=machine()), encoding="utf-8")


def machine() -> str:
    import torch

    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """Undisturbed results of every stage, and a process that runs stages quickly."""
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.close()


@pytest.fixture
def tally(request) -> Callable[..., Tally]:
    """Opens a line of the table; at the end of the test it must hold no difference and nothing silent."""
    opened: list[tuple[Tally, float]] = []

    def open_tally(what: str, stage: str = "", note: str = "") -> Tally:
        for made, started in opened:
            made.seconds = made.seconds or time.monotonic() - started
        opened.append((Tally(what, stage, note=note), time.monotonic()))
        request.config.stash.setdefault(TALLIES, []).append(opened[-1][0])
        return opened[-1][0]

    yield open_tally
    for made, started in opened:
        made.seconds = made.seconds or time.monotonic() - started
    wrong = [line for made, _ in opened for line in [*made.silent, *made.differences]]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])
