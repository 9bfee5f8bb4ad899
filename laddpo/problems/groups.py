"""Groups of a generated task's problems: where the habit that a base was taught shows, and where it does not.

A mean over all problems hides that a run mends one group and harms the other.
"""

from __future__ import annotations

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
    if task == "word_problems":
        problems = word_problems(fields["split"], fields["items"], fields["seed"])
        shows = {f"{task}-{one.question}": one.solution(habit) != one.solution() for one in problems}
        return {name: SHOWS if shown else OTHER for name, shown in shows.items()}
    if task != "arithmetic":
        return {}
    found, difficulty = {}, arithmetic.Difficulty(*(fields[name] for name in ("operand_max", "terms", "width")))
    for one in arithmetic.problems(fields["split"], fields["items"], fields["seed"], difficulty):
        group = OTHER
        if arithmetic.mistaken_solution(one, habit) is not None:
            is_unseen = arithmetic.is_unseen(one.steps[one.habit_step], unseen_steps)
            group = SHOWS if not unseen_steps else UNSEEN if is_unseen else ASKED
        found[f"{task}-{one.text}"] = group
    return found
