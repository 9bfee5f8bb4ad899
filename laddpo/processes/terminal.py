"""Text that fits the terminal: what is too wide for it is wrapped, and nothing is left out."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

NO_BREAK = "\N{NO-BREAK SPACE}"


def columns() -> int | None:
    """Width of the terminal, or COLUMNS if that is set; None if the output is a file or a pipe."""
    return shutil.get_terminal_size((0, 0)).columns or None


def fits(text: str) -> bool:
    """Whether every line of `text` fits the terminal."""
    width = columns()
    return width is None or all(len(line) <= width for line in text.splitlines())


def hanging(first: str, words: str) -> str:
    """`first` and `words` as one line, or wrapped with further lines below `words`."""
    width = columns()
    if width is None or len(first) + len(words) <= width:
        return first + words
    indent = first if len(first) < width // 2 else " " * 4
    head = [] if indent == first else [first.rstrip()]
    look = {"initial_indent": indent, "subsequent_indent": " " * len(indent)}
    return "\n".join([*head, *textwrap.wrap(words, width, break_on_hyphens=False, break_long_words=False, **look)])


def stacked(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a narrow terminal: each row as its first cell, with the others named below it."""
    lines = []
    for first, *others in rows:
        named = [f"{name} {cell}".strip() for name, cell in zip(header[1:], others, strict=True) if cell]
        kept = ", ".join(text.replace(" ", NO_BREAK) for text in named)  # a name stays with its number
        lines += [first, hanging("  ", kept).replace(NO_BREAK, " ")]
    return "\n".join(lines)
