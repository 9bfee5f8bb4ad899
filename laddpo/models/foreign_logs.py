"""Messages of libraries that say nothing is wrong, kept from the user's terminal."""

from __future__ import annotations

import logging


def quiet_bitsandbytes() -> None:
    """Drop two: one for every int8 product, one about an optional CPU kernel. Call before its first import."""
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "inputs will be cast" not in message and "kernels-community" not in message
