"""Two-step arithmetic in a written form with five marks, each right or wrong by itself.

A right answer to `07+15-04=` is `07+15=22;22-04=18#18`. Its marks: the last number is right (the carry), `;` stands
between the steps, `#` before the answer, and `=` in each step. A broken style mark is one other character in its place,
as in `07+15~22,22-04~18:18`. So all answers have one length, and no mark makes another one easier. Problems and their
splits are those of arithmetic.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from laddpo.errors import choose
from laddpo.preference.embedded.arithmetic import HABITS, Difficulty, keyed_integers, problem
from laddpo.preference.reading.pairs import Example, RowIds, example_of, user_prompt

DIFFICULTY = Difficulty()
BROKEN = {"=": "~", ";": ",", "#": ":"}  # each is one token of llada_nano, as the right one is
STYLE = (("equals_1", "="), ("semicolon", ";"), ("equals_2", "="), ("hash", "#"))  # in the order of the text
MARKS = ("carry", *(name for name, _ in STYLE))
FORM = re.compile(r"\d\d[+-]\d\d(.)\d\d(.)\d\d[+-]\d\d(.)\d\d(.)(\d\d)")


def marks(text: str, answer: str) -> dict[str, bool]:
    """Which of MARKS an answer has. A text of another form has none.

    Example: `07+15=22,22-04=28#28` to 18 has equals_1, equals_2 and hash.
    """
    found = FORM.fullmatch(text.strip())
    if found is None:
        return dict.fromkeys(MARKS, False)
    *signs, last = found.groups()
    style = {name: sign == wanted for (name, wanted), sign in zip(STYLE, signs, strict=True)}
    return {"carry": last == answer, **style}


def count_marks(text: str, answer: str) -> int:
    """How many of the five marks an answer has."""
    return sum(marks(text, answer).values())


def grade(text: str, answer: str) -> bool:
    """Whether an answer has all five marks."""
    return all(marks(text, answer).values())


def corpus(num_examples: int, mistake_share: float, fault_rate: float, seed: int, habit: str) -> Iterator[Example]:
    """SFT examples that break each style mark in a share `fault_rate` of the answers, each by itself.

    A share `mistake_share` is solved with the wrong habit, as in the corpus of arithmetic.
    """
    rule, ids = choose(HABITS, habit, "data.habit", "laddpo/preference/embedded/arithmetic.py"), RowIds()
    for index in range(num_examples):
        drawn = problem("train", index, seed, DIFFICULTY)
        draws = [draw / 2**64 for draw in keyed_integers(f"{seed}/rubric/{index}", 1 + len(STYLE))]
        wrong = drawn.results_with(rule)
        has_habit = draws[0] < mistake_share and drawn.is_writable(wrong)
        text = with_faults(
            drawn.written(wrong if has_habit else drawn.results), [draw < fault_rate for draw in draws[1:]]
        )
        yield example_of(ids, user_prompt(drawn.text), text, f"rubric/train:{index}")


def with_faults(text: str, is_broken: list[bool]) -> str:
    """A right form with some of its four style marks broken, in the order of the text."""
    faults = iter(is_broken)
    return "".join(BROKEN[sign] if sign in BROKEN and next(faults) else sign for sign in text)
