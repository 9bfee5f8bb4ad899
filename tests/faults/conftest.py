"""One warmed parent for all fault tests, and the table of what they did."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.faults.bench import Bench, Tally

TALLIES = pytest.StashKey[list]()


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
    wrong = [line for made, _ in opened for line in [*made.differences, *made.silent]]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])
