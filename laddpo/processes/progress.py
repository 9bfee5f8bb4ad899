"""Progress of long work: a bar on a terminal, plain lines in a log file or a pipe."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 10.0  # between two lines


class Progress(tqdm):
    """tqdm's bar. If the output is no terminal, it prints a line every ten seconds and one at the end, no frames."""

    def __init__(self, *args: Any, **named: Any):
        self.is_plain = not is_terminal(named.get("file") or sys.stderr)
        if self.is_plain:
            is_counted = named.get("total") is not None or hasattr(args[0] if args else None, "__len__")
            named |= {"bar_format": COUNTED if is_counted else UNCOUNTED, "mininterval": SECONDS, "delay": SECONDS}
            named["unit"] = named.get("unit", "").strip()
        super().__init__(*args, **named)

    @staticmethod
    def status_printer(file):
        """How a state is written to `file`."""
        if is_terminal(file):
            return tqdm.status_printer(file)
        last = ""

        def write(text: str) -> None:
            nonlocal last
            if text and text != last:
                file.write(f"{text}\n")
                file.flush()
            last = text or last

        return write

    def clear(self, nolock: bool = False) -> None:
        """Make room for another line; plain lines are in nobody's way."""
        if not self.is_plain:
            super().clear(nolock)

    def close(self) -> None:
        """The last state, if anything was done."""
        if self.is_plain and not self.disable:
            if self.n > self.initial:
                self.display()
            self.disable = True
            self._decr_instances(self)
        super().close()


def is_terminal(file: Any) -> bool:
    """Whether frames of a bar can be drawn over one another there."""
    return bool(getattr(file, "isatty", lambda: False)())


def quiet_datasets() -> None:
    """Switch off the bars of the package `datasets`, which draws frames into log files."""
    if not is_terminal(sys.stderr):
        from datasets import disable_progress_bars

        disable_progress_bars()


COUNTED = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} elapsed, {remaining} left{postfix}"
UNCOUNTED = "{desc}: {n_fmt} {unit}, {elapsed} elapsed{postfix}"
