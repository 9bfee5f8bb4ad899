"""Is a generated answer right: graders of whole texts against a gold answer, each with a name that results can state.

A text and a gold answer go in, True or False comes out; a text that cannot be graded is wrong, never an error.
math-verify (extra `eval`) interrupts itself with SIGALRM, which only works in the main thread of a process, so it
lives in a worker process of its own that is killed and replaced when it hangs or dies.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from importlib import metadata
from typing import Any

from laddpo.errors import UserError

# a minus counts only where it cannot be a subtraction: "10-5" holds 10 and 5, "= -5" and "$-5" hold -5
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$-?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
BOXED = re.compile(r"\\boxed\s*\{")
# one number, perhaps with what it counts: all that can be compared without math-verify
PLAIN = re.compile(rf"(?:{NUMBER.pattern})\s*[%.]?(?:\s+[A-Za-z]+)*")
READY = "ready"
START_S = 120.0  # a new process importing sympy from a cold disk
ANSWER_S = 30.0  # math-verify stops itself after 5 s of parsing and 5 s of comparing


class FunctionGrader:
    """A grader made of one function `grade(text, answer) -> bool`."""

    def __init__(self, name: str, grade: Callable[[str, str], bool]):
        self.name = name
        self._grade = grade

    def grade_all(self, texts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [bool(self._grade(text, answer)) for text, answer in zip(texts, answers, strict=True)]

    def close(self) -> None:
        pass


class NoGrader:
    """For answers that nobody knows to be right or wrong: each is None."""

    name = "none"

    def grade_all(self, texts: Sequence[str], answers: Sequence[str]) -> list[None]:
        return [None] * len(texts)

    def close(self) -> None:
        pass


class WorkerGrader:
    """A grader in a worker process, started at the first text; `close()` ends it.

    `serve(pipe)` runs in the worker: it sends READY, then receives (text, answer) and sends a bool until the pipe
    closes.
    A worker that never gets ready is a `UserError`; one that hangs or dies on a text makes that text wrong.
    """

    def __init__(self, name: str, serve: Callable[[Any], None], answer_s: float = ANSWER_S):
        self.name = name
        self._serve, self._answer_s = serve, answer_s
        self._worker: multiprocessing.process.BaseProcess | None = None
        self._pipe = None

    def grade_all(self, texts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [self._grade(text, answer) for text, answer in zip(texts, answers, strict=True)]

    def _grade(self, text: str, answer: str) -> bool:
        if self._worker is None:
            self._start()
        self._pipe.send((text, answer))
        reply = self._receive(self._answer_s)
        if reply is None:
            self.close()  # the next text starts another worker
        return bool(reply)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share this process's CUDA context and threads
        self._pipe, theirs = context.Pipe()
        # off POSIX math-verify starts processes itself, which a daemon may not
        self._worker = context.Process(target=self._serve, args=(theirs,), daemon=os.name == "posix")
        self._worker.start()
        theirs.close()
        if self._receive(START_S) != READY:
            self.close()
            raise UserError(
                f"{self.name}: the worker process could not start (its own message is above). Reinstall with "
                f"pip install 'laddpo[eval]', or uninstall math-verify to compare final numbers instead."
            )

    def _receive(self, seconds: float) -> Any:
        """The worker's next message, or None when it hangs or has died."""
        try:
            return self._pipe.recv() if self._pipe.poll(seconds) else None
        except (EOFError, OSError):
            return None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.join()
            self._pipe.close()
            self._worker = self._pipe = None


Grader = FunctionGrader | WorkerGrader | NoGrader


def math_grader(answers: Sequence[str] = ()) -> Grader:
    """math-verify where it is installed, else the plain comparison of final numbers; `.name` says which.

    Without math-verify a gold answer that is a formula is a `UserError`: at once where it is among `answers`.
    """
    if importlib.util.find_spec("math_verify") is not None:
        name = f"math-verify {metadata.version('math-verify')} on gold answers as LaTeX, in a worker process"
        return WorkerGrader(name, _serve_math_verify)
    for answer in answers:
        _require_number(answer)
    return FunctionGrader("numeric comparison of the final number (math-verify is not installed)", _same_plain_number)


def _same_plain_number(text: str, answer: str) -> bool:
    _require_number(answer)
    return same_final_number(text, answer)


def _require_number(answer: str) -> None:
    if not PLAIN.fullmatch(answer_part(answer).strip().strip("$")):
        raise UserError(
            f"the gold answer {answer!r} is not one plain number, and math-verify, which compares formulas, is not "
            "installed; pip install 'laddpo[eval]', or compare texts where a grader can be chosen "
            "(evaluation.grader=exact, data.grader=exact)."
        )


def same_final_number(text: str, answer: str) -> bool:
    """Whether the final numbers of `text` and `answer` are equal: "… so $1,080.00." is "1080"."""
    found, gold = final_number(text), final_number(answer)
    return found is not None and found == gold


def text_grader(name: str, answers: Sequence[str]) -> Grader:
    """The grader of that name, for texts whose gold answers are `answers`."""
    return GRADERS[name](answers)


def auto_grader(answers: Sequence[str]) -> Grader:
    """ "math" if every answer is a number or a formula, else "exact"."""
    return text_grader("math" if all(FORMULA.fullmatch(answer) for answer in answers) else "exact", answers)


def same_text(text: str, answer: str) -> bool:
    """Equal but for case and spaces, as the whole text or as the part that states the answer."""
    wanted = " ".join(answer.split()).casefold()
    return wanted in (" ".join(part.split()).casefold() for part in (text, answer_part(text)))


def contains_text(text: str, answer: str) -> bool:
    """The answer is in the text as whole words, in any case."""
    wanted = r"\s+".join(re.escape(word) for word in answer.split())
    return re.search(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE) is not None


def same_choice(text: str, answer: str) -> bool:
    """The first letter or digit that is a word by itself is the choice: "B", "(B)", "The answer is B." are all B.

    An "A" before a word is the article, and no choice, unless that word tells otherwise ("A is right").
    """
    found = CHOICE.search(answer_part(text))
    return found is not None and found[1] == answer


def final_number(text: str) -> Decimal | None:
    """The last number of the part of `text` that states the answer; None if there is none.

    Thousands separators and a dollar sign are dropped: "a total of $-1,234.50" gives -1234.50. A number is compared by
    value, so 18.0 equals 18.
    """
    numbers = NUMBER.findall(answer_part(text))
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", "").replace("$", ""))
    except InvalidOperation:  # "--5"
        return None


def answer_part(text: str) -> str:
    """What states the answer: the line after the last `####`, else the last \\boxed{…}, else the whole text."""
    if "####" in text:
        after = text.rsplit("####", 1)[1].strip()
        return after.splitlines()[0] if after else ""
    boxed = last_boxed(text)
    return text if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    """The content of the last closed \\boxed{…}, inner braces included; None if there is none."""
    for opening in reversed(list(BOXED.finditer(text))):
        depth = 1
        for end in range(opening.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[opening.end() : end]
    return None


def _serve_math_verify(pipe: Any) -> None:
    """The worker: grade (text, answer) messages until the other end closes."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an ungradable text is an ordinary wrong answer
    pipe.send(READY)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            text, answer = pipe.recv()
            boxed = None if "####" in text else last_boxed(text)
            said = answer_part(text) if boxed is None else _delimited(boxed)
            try:
                is_right = bool(verify(parse(_delimited(answer_part(answer))), parse(said)))
            except Exception:
                is_right = False
            pipe.send(is_right)


def _delimited(formula: str) -> str:
    """As math-verify reads it: outside of LaTeX's delimiters it finds single numbers at most."""
    return formula if formula.count("$") > 1 else f"${formula}$"


CHOICE = re.compile(r"(?<![\w'])([B-H1-8]|A(?!\s+(?!(?:is|was|because|since|as|for|and|or|but)\b)[a-z]))(?![\w'])")
FORMULA = re.compile(r"[-+$\\]?[\d.,]+%?|\$?\\?[\\{}()\[\]\d\s+\-*/^_.,a-z]*\\[a-z]+.*\$?")

UNGRADED = NoGrader()
GRADERS: dict[str, Callable[[Sequence[str]], Grader]] = {
    "auto": auto_grader,
    "exact": lambda answers: FunctionGrader("equal text", same_text),
    "number": lambda answers: FunctionGrader("equal final number", same_final_number),
    "math": math_grader,
    "contains": lambda answers: FunctionGrader("answer contained in the text", contains_text),
}
