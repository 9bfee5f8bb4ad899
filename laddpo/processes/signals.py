"""Stopping on request: the first SIGTERM or SIGINT sets a flag that every loop polls, the second ends at once.

Saving inside a signal handler hangs or half-writes; a flag read between two units of work does neither.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from laddpo.errors import EXIT_STOPPED, Stopped


class StopFlag:
    """True once a signal asked to stop. `name` is the signal's name."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.raises = False  # see `at_once`

    def __bool__(self) -> bool:
        return self.name is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Within the block, SIGTERM and SIGINT set the flag; a second one exits with code 75 without further saving.

    Outside the main thread, where Python allows no handlers, the flag simply stays false.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame) -> None:
        if flag:
            os._exit(EXIT_STOPPED)
        flag.name = signal.Signals(number).name
        # not print: a handler may run inside a write to stderr, whose buffer refuses to be entered twice
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            with contextlib.suppress(OSError):
                os.write(2, f"\n{flag.name}: stopping where nothing is lost; once more to stop at once.\n".encode())
        if flag.raises:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is handle:  # one set meanwhile stays: it knows more
                signal.signal(number, handler)


@contextlib.contextmanager
def at_once(stop: StopFlag | None, found: str, cure: str) -> Iterator[None]:
    """Within the block a signal ends the work wherever it is, as `Stopped(found, cure)`.

    For work of others that polls nothing, and for work that writes nothing before its end.
    """
    if stop is None:
        yield
        return
    outer, stop.raises = stop.raises, True
    try:
        if stop:
            raise KeyboardInterrupt
        yield
    except BaseException as error:  # a library may make an error of its own of an interrupt
        if stop and not isinstance(error, Stopped):
            raise Stopped(found, cure) from None
        raise
    finally:
        stop.raises = outer
