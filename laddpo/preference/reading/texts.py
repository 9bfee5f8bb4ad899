"""Checks on a text of a row: what cannot be meant or encoded is refused, what is only doubtful is counted."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from laddpo.preference.reading.bad_rows import RowError

if TYPE_CHECKING:
    from laddpo.preference.reading.rows import RowRules


def check_text(text: str, name: str, rules: RowRules, warn: Callable[[str], None]) -> None:
    """Refuse text that cannot be meant or cannot be encoded; count what is only doubtful."""
    is_prompt = name.split("[")[0] in ("prompt", "system")
    if not text:
        if is_prompt and rules.allow_empty_prompt:
            return
        raise RowError("DATA-05" if is_prompt else "DATA-07", name, "is empty", FIX)
    if is_blank(text):
        code = "DATA-08" if is_prompt else "DATA-07"
        raise RowError(code, name, "empty after strip: only white space or invisible characters", FIX)
    if text.isascii() and "\x00" not in text:
        return
    if "\x00" in text and not rules.allow_nul:
        raise RowError("DATA-28", name, f"has the character NUL at {text.index(chr(0))}", "Remove it.")
    if half := half_in(text):
        problem = f"has half of a surrogate pair, {half.group()!a}, at character {half.start()}"
        raise RowError("DATA-29", name, problem, WHOLE)
    if _DOUBTFUL.search(text):
        for message, pattern in DOUBTFUL.items():
            if pattern.search(text):
                warn(message)
    if not unicodedata.is_normalized("NFC", text):
        warn("texts that are not in Unicode normal form C, kept as they are")


def half_in(text: str) -> re.Match | None:
    """Half of a surrogate pair, which no tokenizer takes. On a command line, a byte that is not UTF-8 becomes one."""
    return _SURROGATES.search(text)


def is_blank(text: str) -> bool:
    """Whether nothing would be seen: white space, zero-width characters, byte order marks, soft hyphens."""
    return not any(map(_is_visible, text))


def _is_visible(character: str) -> bool:
    return not character.isspace() and character not in _INVISIBLE


def kind_of(value: Any) -> str:
    """A value's kind in the words of JSON, with the value where it is short."""
    kinds = {type(None): "null", bool: "a boolean", int: "an int", float: "a float", str: "text", list: "a list"}
    kind = kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")
    shown = str(value)[:40] if isinstance(value, (bool, int, float)) else ""
    return f"{kind} ({shown})" if shown else kind


FIX = "Fix the row or set data.on_bad_row=skip."
WHOLE = "Write the whole pair, or the character itself, in UTF-8."
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e \t\r\n\u00a0"
_SURROGATES = re.compile("[\ud800-\udfff]")
DOUBTFUL = {
    "texts with U+FFFD, which an earlier bad decoding leaves": re.compile("\ufffd"),
    "texts with private-use characters or noncharacters": re.compile(
        "[\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]"
    ),
    "texts with look-alikes of special tokens, which they are not": re.compile(
        "＜[|｜]|<｜|[|｜]＞|｜>|<[\u200b-\u200d\u2060]+[|]|<[|]\\w*[\u200b-\u200d\u2060]\\w*[|]>"
    ),
    "texts with bidirectional control characters": re.compile("[\u202a-\u202e\u2066-\u2069]"),
}
_DOUBTFUL = re.compile("|".join(pattern.pattern for pattern in DOUBTFUL.values()))
