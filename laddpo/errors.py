"""What a user can cause: one exception, one form of message, one way to look a name up in a table.

A `UserError` is printed without a traceback and ends the process with exit code 2. Everything else that escapes a
stage is a fault of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_STOPPED = 75  # stopped by a signal, checkpoint saved (EX_TEMPFAIL: a scheduler may requeue)

T = TypeVar("T")


class UserError(Exception):
    """A mistake in the user's input or settings.

    The message names the file, line, field or config key, what was found, what was expected, and what to do. Several
    mistakes found together travel as one error, one paragraph each.
    """

    exit_code = EXIT_USER

    def __init__(self, *problems: str):
        assert problems, "a UserError without a problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class Damaged(UserError):
    """A file that we wrote is gone or not what we wrote. `found` says which and how, without the cure."""

    def __init__(self, found: str, cure: str):
        self.found = found
        super().__init__(f"{found} {cure}")


class RunFault(UserError):
    """A run that cannot continue although no setting is wrong, for example a loss that is not finite. Its message has
    the same form, its exit code is 1."""

    exit_code = EXIT_FAULT


class NonFiniteStep(RunFault):
    """Loss or gradient of a step is not finite. `facts` is what a report about it says beside the settings."""

    def __init__(self, problem: str, facts: Mapping[str, object]):
        super().__init__(problem)
        self.facts = dict(facts)


class Stopped(UserError):
    """A signal asked the stage to stop, and everything needed to continue is saved. Exit code 75.

    `found` says what was stopped and what is kept, without how to continue.
    """

    exit_code = EXIT_STOPPED

    def __init__(self, found: str, cure: str):
        self.found = found
        super().__init__(f"{found} {cure}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be, or None when nothing is close."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def choose(table: Mapping[str, T], name: str, field: str, where: str) -> T:
    """Look `name` up in a table of options.

    `field` is the config key the name came from and `where` the file a new row would be added to. Raises `UserError`
    with the known names when there is no such row.
    """
    if name in table:
        return table[name]
    guess = nearest(name, table)
    hint = f"did you mean {guess}? " if guess else ""
    raise UserError(
        f"{field} is {name!r}; known: {', '.join(sorted(table))}; {hint}"
        f"fix the name or add a row to the table in {where}."
    )


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
