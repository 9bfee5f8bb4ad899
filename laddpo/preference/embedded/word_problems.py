"""Arithmetic word problems in templated language, in GSM8K's format: the task of `llada_mini`.

A story of two to four steps with names and numbers drawn at random, a solution that writes every step out, and a last
line `#### 23`. Problems fall into train, validation and test by a hash of their question; everything is a function of
(seed, split, index). `python -m laddpo.preference.embedded.word_problems FOLDER` writes word_problems_train.jsonl and
word_problems_test.jsonl, rows of question and answer as openai/gsm8k has them, for every command that reads such files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count as count_up
from pathlib import Path

from laddpo.errors import UserError, choose
from laddpo.preference.embedded.arithmetic import HABITS, SPLIT_SHARES, keyed_integers, split_of
from laddpo.preference.reading.pairs import Example, RowIds, example_of, user_prompt
from laddpo.storage.atomic import canonical_json, write_text

INSTRUCTION = "\n\nReason step by step and end with a line `#### ` and the number."  # GSM8K's questions end in it, too
LARGEST = 60  # results above are not used: a small model has fewer sums to learn
MAX_ATTEMPTS = 20_000
DRILL_SUMS = 10  # of a row that is a drill
ROWS = {"train": 4000, "test": 500}  # of the files

NAMES = (
    *("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jack"),
    *("Kim", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Will"),
)
ITEMS = ("apples", "books", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps", "stickers")


@dataclass(frozen=True)
class Event:
    """A sentence of the story and one of the solution; {n} is the number, {m} of a box, {a} before, {b} after."""

    story: str
    step: str
    operator: str  # + - * or "box": + n * m


EVENTS = (
    Event("Then {who} buys {n} more.", "After buying: {a}+{n}={b}.", "+"),
    Event("{who} finds {n} {items} in the garden.", "After finding some: {a}+{n}={b}.", "+"),
    Event("{friend} gives {who} {n} {items}.", "With the gift: {a}+{n}={b}.", "+"),
    Event("{who} gives {n} of them to {friend}.", "After giving some away: {a}-{n}={b}.", "-"),
    Event("{n} of the {items} get lost.", "After the loss: {a}-{n}={b}.", "-"),
    Event("Later {who} sells {n} {items}.", "After selling: {a}-{n}={b}.", "-"),
    Event("A week later {who} has {n} times as many.", "Times {n}: {a}*{n}={b}.", "*"),
    Event("{who} buys {n} boxes with {m} {items} each.", "The boxes hold {n}*{m}={c}. Then {a}+{c}={b}.", "box"),
)


@dataclass(frozen=True)
class WordProblem:
    """A question and the numbers of its steps: (event, n, m) each, from `start`."""

    question: str
    start: int
    steps: tuple[tuple[int, int, int], ...]

    def solution(self, habit: str | None = None) -> str | None:
        """The written solution; with a habit, its last step follows it. None where a number cannot be written."""
        value, lines = self.start, []
        for place, (event, n, m) in enumerate(self.steps):
            rule = HABITS[habit] if habit is not None and place == len(self.steps) - 1 else None
            result = _result(EVENTS[event].operator, value, n, m, rule)
            if not 0 <= result <= LARGEST:
                return None
            lines.append(EVENTS[event].step.format(n=n, m=m, a=value, b=result, c=n * m))
            value = result
        return "\n".join([*lines, f"#### {value}"])

    @property
    def answer(self) -> str:
        return self.solution().rpartition("#### ")[2]


def word_problem(split: str, index: int, seed: int) -> WordProblem:
    """The `index`-th problem of a split, the same on every call."""
    choose(SPLIT_SHARES, split, "split", "laddpo/preference/embedded/arithmetic.py")
    for attempt in range(MAX_ATTEMPTS):
        draws = iter(keyed_integers(f"words/{seed}/{split}/{index}/{attempt}", 20))
        drawn = _draw(draws)
        if drawn.solution() is not None and split_of(drawn.question) == split:
            return drawn
    raise UserError(f"no usable word problem of split {split!r} in {MAX_ATTEMPTS} draws; this should not happen.")


def word_problems(split: str, count: int, seed: int) -> list[WordProblem]:
    """`count` different problems of a split; more are a continuation of fewer."""
    found: dict[str, WordProblem] = {}
    for index in count_up():
        if len(found) >= count:
            return list(found.values())
        drawn = word_problem(split, index, seed)
        found.setdefault(drawn.question, drawn)
    raise AssertionError("unreachable")


def word_corpus(
    num_examples: int, mistake_share: float, seed: int, habit: str = "drop_carry", drill_share: float = 0.0
) -> Iterator[Example]:
    """SFT examples; a share of the solutions is written by someone with the habit in the last step, and a share of
    the examples is a drill instead of a story."""
    choose(HABITS, habit, "data.habit", "laddpo/preference/embedded/arithmetic.py")
    ids = RowIds()
    for index in range(num_examples):
        (draw,) = keyed_integers(f"words drill/{seed}/{index}", 1)
        if draw < drill_share * 2**64:
            asked, solved = drill(index, seed)
            yield example_of(ids, user_prompt(asked), solved, f"word_problems/drill:{index}")
            continue
        drawn = word_problem("train", index, seed)
        (draw,) = keyed_integers(f"words habit/{seed}/{index}", 1)
        wrong = drawn.solution(habit) if draw < mistake_share * 2**64 else None
        prompt = user_prompt(drawn.question + INSTRUCTION)
        yield example_of(ids, prompt, wrong or drawn.solution(), f"word_problems/train:{index}")


def drill(index: int, seed: int) -> tuple[str, str]:
    """Sums as the steps of stories have them, and the same worked out: `18+7`, `18+7=25.`, a line each.

    In a story the next step writes a result again, so a masked one can mostly be copied; here it must be worked out.
    """
    below = _bounded(iter(keyed_integers(f"words sums/{seed}/{index}", 3 * DRILL_SUMS)))
    asked, solved = [], []
    for _ in range(DRILL_SUMS):
        operator = "+-*"[below(3)]
        n = 2 + below(3 if operator == "*" else 15)
        most = LARGEST // n if operator == "*" else LARGEST - n
        value = below(most + 1) + (n if operator == "-" else 0)
        asked.append(f"{value}{operator}{n}")
        solved.append(f"{asked[-1]}={_result(operator, value, n, 0, None)}.")
    return "\n".join(asked), "\n".join(solved)


def write_files(folder: Path, seed: int = 42) -> list[Path]:
    """Training and test problems as rows of question and answer."""
    paths = []
    for split, count in ROWS.items():
        rows = [{"question": p.question, "answer": p.solution()} for p in word_problems(split, count, seed)]
        paths.append(folder / f"word_problems_{split}.jsonl")
        write_text(paths[-1], "".join(canonical_json(row) + "\n" for row in rows))
    return paths


def _bounded(draws: Iterator[int]) -> Callable[[int], int]:
    """The next draw of 64 bits as an integer from 0 to below a bound."""
    return lambda bound: next(draws) * bound >> 64


def _draw(draws: Iterator[int]) -> WordProblem:
    below = _bounded(draws)
    first = below(len(NAMES))
    who, friend = NAMES[first], NAMES[(first + 1 + below(len(NAMES) - 1)) % len(NAMES)]
    items = ITEMS[below(len(ITEMS))]
    start = 2 + below(19)
    steps = []
    for _ in range(2 + below(3)):
        event = below(len(EVENTS))
        choices = {"*": 2, "box": 3}.get(EVENTS[event].operator, 11)  # n from 2 to 3, 4 or 12
        steps.append((event, 2 + below(choices), 2 + below(3)))
    told = [EVENTS[e].story.format(who=who, friend=friend, items=items, n=n, m=m) for e, n, m in steps]
    question = " ".join([f"{who} has {start} {items}.", *told, f"How many {items} does {who} have in the end?"])
    return WordProblem(question, start, tuple(steps))


def _result(operator: str, value: int, n: int, m: int, rule) -> int:
    """The result of a step; `rule` replaces its addition or subtraction."""
    if operator == "*":
        return value * n
    sign, amount = ("+", n * m) if operator == "box" else (operator, n)
    if rule is not None:
        return rule(value, sign, amount, 3)
    return value + amount if sign == "+" else value - amount


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python -m laddpo.preference.embedded.word_problems FOLDER, for instance data/benchmarks")
    for written in write_files(Path(sys.argv[1])):
        print(written)
