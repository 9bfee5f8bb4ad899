"""Text from models, data and files as a terminal may show it: control characters are written out, so that they act on
nothing. Files that other programs read keep the text as it is."""

from __future__ import annotations

import re


def visible(text: str) -> str:
    r"""The text with every control character but newline and tab as an escape: "\x1b[2J" for a cleared screen.

    Also those that turn the direction of writing, which hide what a text says, and halves of surrogate pairs.
    """
    return _ACTING.sub(lambda found: _escape(ord(found.group())), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
