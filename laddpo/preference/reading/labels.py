"""What the label of an unpaired row says: whether its completion is desirable.

Yes and no are read in the spellings of WORDS and as the numbers 1, and 0 or -1. Everything else is refused. Numbers
that may mean something else (ratings, or 0 beside -1) stop the reading, since they make the other labels doubtful too.
"""

from __future__ import annotations

import re
from typing import Any

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import RowError


class LabelReader:
    """Reads the labels of one data set. `threshold`: labels are ratings, and those from it on are desirable."""

    def __init__(self, column: str, threshold: float | None = None):
        self._column, self._threshold = column, threshold
        self._first: dict[float, str] = {}  # of 0 and of -1: the first row that has it

    def read(self, value: Any, place: str) -> bool:
        """Whether the label is a yes. Raises RowError for what is no label, UserError for doubtful numbers."""
        value = value.item() if hasattr(value, "item") else value  # of NumPy
        if value is None:
            raise RowError("DATA-04", self._column, "is null", "Give true or false, or remove the row.")
        number = number_of(value)
        if self._threshold is not None:
            if number is None:
                problem = f"is {shown(value)}, and data.label_threshold={self._threshold:g} wants a number"
                advice = "Leave data.label_threshold out for labels that say yes or no, or remove the row."
                raise RowError("DATA-120", self._column, problem, advice)
            return number >= self._threshold
        if isinstance(value, bool):
            return value
        if number is not None:
            self._refuse_doubtful(value, number, place)
            return number == 1
        word = re.sub(r"[\s_-]+", " ", value.strip().casefold()) if isinstance(value, str) else None
        if word not in WORDS:
            raise RowError(
                "DATA-120", self._column, f"is {shown(value)}, want {WANTED}", "Correct it, or remove the row."
            )
        return WORDS[word]

    def _refuse_doubtful(self, value: Any, number: float, place: str) -> None:
        if number not in (1, 0, -1):
            raise UserError(
                f"{place}: {self._column}: is {shown(value)}, want {WANTED} (DATA-121). If it is a rating, "
                "data.label_threshold=4 makes 4 and above desirable. If it is no label, name the column of the labels "
                "by data.columns.label."
            )
        if number != 1:
            self._first.setdefault(number, place)
        if len(self._first) == 2:
            other = -number - 1
            raise UserError(
                f"{place}: {self._column}: is {shown(value)}, and {self._first[other]} has {other:g}: beside -1, 0 may "
                "mean that nobody voted (DATA-121). Remove the rows with 0, or write true and false."
            )


def is_label(value: Any) -> bool:
    """Whether a value says yes or no."""
    try:
        LabelReader("label").read(value, "")
    except UserError:
        return False
    return True


def number_of(value: Any) -> float | None:
    """A number, or the text of one; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?\s*", value):
        return float(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def shown(value: Any) -> str:
    """A value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


WANTED = "true or false, 1 or 0, 1 or -1, up or down, good or bad"
WORDS = {  # in lower case, words parted by one space
    **dict.fromkeys(
        ("true", "yes", "up", "thumbs up", "thumbsup", "👍", "good", "positive", "desirable", "like"), True
    ),
    **dict.fromkeys(("false", "no", "down", "thumbs down", "thumbsdown", "👎", "bad", "negative"), False),
    **dict.fromkeys(("undesirable", "dislike"), False),
}
