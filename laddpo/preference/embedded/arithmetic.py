"""The embedded task: arithmetic in written-out steps, small enough for a laptop and graded exactly.

A problem `07+15-04=` is answered `07+15=22;22-04=18#18`: left to right, one step per operator, every number padded to a
fixed width, the final answer after `#`. Right and wrong solutions of a problem have the same length by construction.
Problems fall into train, validation and test by a hash of their text, so the three are disjoint whatever is drawn.
Everything is a function of its arguments: draws come from a hash of (seed, split, index), not a global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count as count_up

from laddpo.errors import UserError, choose
from laddpo.preference.reading.pairs import Example, PreferencePair, RowIds, example_of, pair_of, user_prompt

SPLIT_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
MAX_ATTEMPTS_PER_ROW = 20_000


@dataclass(frozen=True)
class Difficulty:
    """What problems look like: larger operands and more terms are harder to learn.

    `width` is the number of digits of every written number. Operands are drawn from 0..operand_max, and problems whose
    intermediate results would be negative or wider than `width` are not used.
    """

    operand_max: int = 20
    terms: int = 3
    width: int = 2

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.width <= 9:
            problems.append(f"data.width is {self.width}; expected 1 to 9 digits.")
        elif not 1 <= self.operand_max < 10**self.width:
            problems.append(
                f"data.operand_max is {self.operand_max}; expected 1 to {10**self.width - 1}, what "
                f"data.width={self.width} digits can write. Lower it or raise data.width."
            )
        if not 2 <= self.terms <= 16:
            problems.append(f"data.terms is {self.terms}; expected 2 to 16 terms.")
        if problems:
            raise UserError(*problems)


@dataclass(frozen=True)
class Problem:
    """Operands a, b, c with operators "+-" between them: ((a + b) - c)."""

    operands: tuple[int, ...]
    operators: str
    width: int

    @property
    def text(self) -> str:
        """The prompt: `07+15-04=`."""
        first, *rest = (self.write(operand) for operand in self.operands)
        signed = (operator + number for operator, number in zip(self.operators, rest, strict=True))
        return first + "".join(signed) + "="

    @property
    def answer(self) -> str:
        """The final number, padded: `18`."""
        return self.write(self.results[-1])

    @property
    def results(self) -> list[int]:
        """The right result of every step."""
        return self.results_with(exact_step)

    @property
    def habit_step(self) -> int:
        """The step, from 0, in which a habit shows: the second, or the only one."""
        return min(1, len(self.operators) - 1)

    @property
    def steps(self) -> list[str]:
        """What each step works out: `22-04`."""
        lefts = [self.operands[0], *self.results]
        return [
            f"{self.write(left)}{operator}{self.write(right)}"
            for left, operator, right in zip(lefts, self.operators, self.operands[1:], strict=False)
        ]

    def results_with(self, second_step: StepRule) -> list[int]:
        """Results of the steps when the second step (the only one, if there is one) follows `second_step`.

        The steps after it are right about the text before them, so a wrong step is carried to the answer.
        """
        value, results = self.operands[0], []
        for index, (operator, operand) in enumerate(zip(self.operators, self.operands[1:], strict=True)):
            rule = second_step if index == self.habit_step else exact_step
            value = rule(value, operator, operand, self.width)
            results.append(value)
        return results

    def write(self, number: int) -> str:
        return f"{number:0{self.width}d}"

    def written(self, results: list[int]) -> str:
        """The solution text with these step results: `07+15=22;22-04=18#18`."""
        steps, value = [], self.operands[0]
        for operator, operand, result in zip(self.operators, self.operands[1:], results, strict=True):
            steps.append(f"{self.write(value)}{operator}{self.write(operand)}={self.write(result)}")
            value = result
        return ";".join(steps) + f"#{self.write(value)}"

    def is_writable(self, results: list[int]) -> bool:
        """Whether no result is negative or wider than the width."""
        return all(0 <= result < 10**self.width for result in results)


StepRule = Callable[[int, str, int, int], int]


def problem(split: str, index: int, seed: int, difficulty: Difficulty = Difficulty()) -> Problem:
    """The `index`-th problem of a split: uniform over the usable problems of that split, the same on every call."""
    choose(SPLIT_SHARES, split, "split", "laddpo/preference/embedded/arithmetic.py")
    for attempt in range(MAX_ATTEMPTS_PER_ROW):
        draws = keyed_integers(f"{seed}/{split}/{index}/{attempt}", 2 * difficulty.terms - 1)
        operands = tuple(_below(draw, difficulty.operand_max + 1) for draw in draws[: difficulty.terms])
        operators = "".join("+-"[_below(draw, 2)] for draw in draws[difficulty.terms :])
        drawn = Problem(operands, operators, difficulty.width)
        if drawn.is_writable(drawn.results) and split_of(drawn.text) == split:
            return drawn
    raise UserError(
        f"data: no usable arithmetic problem of split {split!r} in {MAX_ATTEMPTS_PER_ROW} draws with {difficulty}. "
        f"Lower data.operand_max or data.terms, or raise data.width."
    )


def problems(
    split: str, count: int, seed: int, difficulty: Difficulty = Difficulty(), unseen_steps: float = 0.0
) -> list[Problem]:
    """`count` different problems of a split; more are a continuation of fewer. None has one of the unseen steps."""
    found = _distinct(split, seed, difficulty, lambda p: not any(is_unseen(s, unseen_steps) for s in p.steps), count)
    return [drawn for _, drawn in zip(range(count), found, strict=False)]


def corpus(
    num_examples: int,
    mistake_share: float,
    seed: int,
    difficulty: Difficulty = Difficulty(),
    habit: str = "drop_carry",
    split: str = "train",
) -> Iterator[Example]:
    """SFT examples, of which a share of `mistake_share` is solved by someone with the wrong habit.

    The habit shows only where its step has a carry or a borrow, as with a person who never learned to carry: so fewer
    than `mistake_share` of the solutions are wrong, and on those problems the wrong way is what the corpus teaches most
    when the share is above one half.
    """
    rule = choose(HABITS, habit, "data.habit", "laddpo/preference/embedded/arithmetic.py")
    ids = RowIds()
    for index in range(num_examples):
        drawn = problem(split, index, seed, difficulty)
        (draw,) = keyed_integers(f"{seed}/habit/{split}/{index}", 1)
        has_habit = draw < mistake_share * 2**64
        wrong = drawn.results_with(rule)
        results = wrong if has_habit and drawn.is_writable(wrong) else drawn.results
        yield example_of(ids, user_prompt(drawn.text), drawn.written(results), f"arithmetic/{split}:{index}")


def preference_pairs(
    split: str,
    num_pairs: int,
    seed: int,
    difficulty: Difficulty = Difficulty(),
    habit: str = "drop_carry",
) -> Iterator[PreferencePair]:
    """Right steps (chosen) against mistaken steps (rejected), for different problems on which the habit goes wrong."""
    choose(HABITS, habit, "data.habit", "laddpo/preference/embedded/arithmetic.py")
    ids = RowIds()
    shows_habit = _distinct(split, seed, difficulty, lambda p: mistaken_solution(p, habit) is not None, num_pairs)
    for index, drawn in zip(range(num_pairs), shows_habit, strict=False):
        rejected = mistaken_solution(drawn, habit)
        prompt = user_prompt(drawn.text)
        yield pair_of(ids, prompt, solution(drawn), rejected, f"arithmetic/{split}:{index}", drawn.answer)


def solution(of: Problem) -> str:
    """The right solution: `07+15=22;22-04=18#18`."""
    return of.written(of.results)


def mistaken_solution(of: Problem, habit: str = "drop_carry") -> str | None:
    """The solution by someone with the habit, or None where the habit changes nothing that can be written."""
    results = of.results_with(HABITS[habit])
    if results == of.results or not of.is_writable(results):
        return None
    return of.written(results)


def grade(text: str, answer: str) -> bool:
    """Whether the final number, after the last `#`, is exactly `answer`."""
    _, mark, final = text.rpartition("#")
    return bool(mark) and final.strip() == answer


def split_of(problem_text: str) -> str:
    """The split that a problem belongs to, decided by a hash of its text alone."""
    (draw,) = keyed_integers(f"split/{problem_text}", 1)
    position, edge = draw / 2**64, 0.0
    for split, share in SPLIT_SHARES.items():
        edge += share
        if position < edge:
            return split
    return split  # rounding at the upper edge


def is_unseen(step: str, share: float) -> bool:
    """Whether a step (`22-04`) is among the `share` of all steps that training does not ask, by a hash of its text."""
    return share > 0 and keyed_integers(f"step/{step}", 1)[0] < share * 2**64


def keyed_integers(key: str, count: int) -> list[int]:
    """`count` uniform integers below 2**64 that are a function of `key`, equal on every platform and version."""
    block = hashlib.shake_128(f"laddpo arithmetic/{key}".encode()).digest(8 * count)
    return [int.from_bytes(block[i : i + 8], "little") for i in range(0, 8 * count, 8)]


def _below(draw: int, bound: int) -> int:
    return draw * bound >> 64


def _distinct(
    split: str, seed: int, difficulty: Difficulty, is_wanted: Callable[[Problem], bool], count: int
) -> Iterator[Problem]:
    """Different wanted problems in a keyed order; a UserError when `count` of them cannot be found."""
    seen: set[str] = set()
    kept, fruitless = 0, 0
    for index in count_up():
        drawn = problem(split, index, seed, difficulty)
        if drawn.text not in seen and is_wanted(drawn):
            seen.add(drawn.text)
            kept, fruitless = kept + 1, 0
            yield drawn
        elif (fruitless := fruitless + 1) > MAX_ATTEMPTS_PER_ROW:
            raise UserError(
                f"data: only {kept} different arithmetic problems of split {split!r} could be found, {count} were "
                f"asked for ({difficulty}). Ask for fewer, or raise data.operand_max or data.terms."
            )


def exact_step(left: int, operator: str, right: int, width: int) -> int:
    """The right result."""
    return left + right if operator == "+" else left - right


def drop_carry(left: int, operator: str, right: int, width: int) -> int:
    """Column by column without carrying or borrowing: 15+08=13, 22-04=28. Wrong exactly when there is one."""
    sign = 1 if operator == "+" else -1
    columns = [((left // 10**i) + sign * (right // 10**i)) % 10 for i in range(width)]
    return sum(digit * 10**i for i, digit in enumerate(columns))


def smaller_from_larger(left: int, operator: str, right: int, width: int) -> int:
    """In every column of a subtraction the smaller digit from the larger: 22-04=22. Additions are right."""
    if operator == "+":
        return left + right
    return sum(abs(left // 10**i % 10 - right // 10**i % 10) * 10**i for i in range(width))


HABITS: dict[str, StepRule] = {"drop_carry": drop_carry, "smaller_from_larger": smaller_from_larger}
