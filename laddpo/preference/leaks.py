"""Training rows whose prompt is also a problem that a model is tested on: counted, so that no score means nothing.

An evaluation set is a function that gives the keys of its prompts (`prompt_group`), called only when they are needed;
one that cannot be had (no network, no such file) raises UserError, and the report says that it was not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from laddpo.errors import UserError

EvaluationPrompts = Mapping[str, Callable[[], Iterable[str]]]


def count_leaks(groups: np.ndarray, evaluation_prompts: EvaluationPrompts) -> tuple[dict[str, int], dict[str, str]]:
    """How many of the rows have a prompt of each evaluation set; and why other sets could not be looked at.

    `groups` uint64 [rows]: keys of the rows' prompts, as numbers.
    """
    counts, unknown = {}, {}
    for name, prompts in evaluation_prompts.items():
        try:
            keys = np.array([int(key, 16) for key in prompts()], dtype=np.uint64)
        except UserError as error:
            unknown[name] = " ".join(str(error).split())[:200]
        else:
            counts[name] = int(np.isin(groups, keys).sum())
    return counts, unknown


def refuse_leaks(counts: Mapping[str, int]) -> None:
    """The error that data.fail_on_leak asks for."""
    found = [f"{count:,} rows whose prompt is in {name}" for name, count in counts.items() if count]
    if found:
        raise UserError(
            f"{'; '.join(found)} (DATA-87). A score on those problems would mean nothing. Remove these rows, test on "
            "other problems, or set data.fail_on_leak=false to get a note instead."
        )
