"""Progress of long work where nobody watches a terminal."""

import io
import os
import select
import time

import pytest

from laddpo.processes import progress
from laddpo.processes.progress import Progress


def test_a_file_gets_lines_and_no_frames(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    out = io.StringIO()
    with Progress(total=4, desc="train", unit="steps", file=out, dynamic_ncols=True) as bar:
        for number in range(4):
            time.sleep(0.06)
            bar.set_postfix({"loss": number}, refresh=False)
            bar.update()
            if number == 2:
                Progress.write("a note", file=out)
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()
    assert lines[-1].startswith("train: 4/4 steps, ") and lines[-1].endswith("loss=3") and lines.count("a note") == 1
    assert len(lines) >= 3 and all(line.startswith("train: ") or line == "a note" for line in lines)


@pytest.mark.parametrize(
    ("items", "said"), [(iter(range(3)), "reading: 3 rows, "), ([1, 2], "reading: 2/2 rows, "), ([], "")]
)
def test_short_work_is_one_line_and_none_is_none(items, said):
    out = io.StringIO()
    assert all(True for _ in Progress(items, desc="reading", unit=" rows", file=out))
    assert out.getvalue().startswith(said) and out.getvalue().count("\n") == bool(said)


def test_a_terminal_gets_a_bar():
    pty = pytest.importorskip("pty", reason="needs the terminals of Unix")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        assert terminal.isatty()
        with Progress(total=2, desc="train", file=terminal, ncols=60) as bar:
            bar.update(2)
        shown = ""
        while "100%|" not in shown and select.select([master], [], [], 10)[0]:
            shown += os.read(master, 10_000).decode()  # what has arrived: seldom all of it
    os.close(master)
    assert "100%|" in shown and "\r" in shown
