"""Groups of a generated task's problems: where the habit that a base was taught shows, and where it does not.

A mean over all problems hides that a run mends one group and harms the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from laddpo.preference.embedded import arithmetic
from laddpo.preference.embedded.word_problems import word_problems

SHOWS, ASKED, UNSEEN, OTHER = "habit", "habit, step asked in training", "habit, step unseen in training", "no habit"


def group_of_items(task: str, fields: Mapping[str, Any], habit: str, unseen_steps: float = 0.0) -> dict[str, str]:
    """The group of each problem of a task by its id; none for tasks that are not made here.

    `fields`: how the problems were made, as `Task.fields` says. `unseen_steps`: the share of steps that no training
    question had (`arithmetic.is_unseen`); with it the habit's problems are two groups, by the step in which it shows.
    """
    made = ("split", "items", "seed")
    if task == "word_problems":
        return _of_word_problems(*(fields[name] for name in made), habit)
    if task == "arithmetic":
        names = (*made, "operand_max", "terms", "width")
        return _of_arithmetic(*(fields[name] for name in names), habit, unseen_steps)
    return {}


@functools.cache  # a study asks for the same problems of every arm, each time that it writes its page
def _of_word_problems(split: str, items: int, seed: int, habit: str) -> dict[str, str]:
    problems = word_problems(split, items, seed)
    return {
        f"word_problems-{one.question}": SHOWS if one.solution(habit) != one.solution() else OTHER for one in problems
    }


@functools.cache
def _of_arithmetic(
    split: str, items: int, seed: int, operand_max: int, terms: int, width: int, habit: str, unseen_steps: float
) -> dict[str, str]:
    found, difficulty = {}, arithmetic.Difficulty(operand_max, terms, width)
    for one in arithmetic.problems(split, items, seed, difficulty):
        group = OTHER
        if arithmetic.mistaken_solution(one, habit) is not None:
            is_unseen = arithmetic.is_unseen(one.steps[one.habit_step], unseen_steps)
            group = SHOWS if not unseen_steps else UNSEEN if is_unseen else ASKED
        found[f"arithmetic-{one.text}"] = group
    return found
