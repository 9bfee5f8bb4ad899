"""The import of bitsandbytes, which peft makes too: quiet, and without the seconds that it takes to load a compiler."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator


def import_bitsandbytes() -> None:
    """Import it before anything else does. Where that fails, nothing is said: the one who needs it will say it.

    Two messages are dropped, as nothing is wrong: one for every int8 product, one about an optional CPU kernel.
    """
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)
    with contextlib.suppress(Exception), _compiled_when_called():  # a broken install raises anything
        import bitsandbytes  # noqa: F401


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "inputs will be cast" not in message and "kernels-community" not in message


@contextlib.contextmanager
def _compiled_when_called() -> Iterator[None]:
    """What is decorated with `torch.compile` meanwhile is compiled at its first call.

    torch loads the compiler as soon as a function is handed to it: three seconds, also where no weight is quantised.
    """
    import torch

    plain = torch.compile

    def compile_later(function: Callable | None = None, **options) -> Callable:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: plain(function, **options))
        return functools.wraps(function)(lambda *arguments, **named: compiled()(*arguments, **named))

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = plain
