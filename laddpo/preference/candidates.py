"""Builds preference pairs for reasoning: correct over incorrect candidate solutions of the same question.

Rows hold a question, its gold answer and a list of candidate solutions; or the candidates are in files of their own,
one `{"question": …, "candidate": …}` a row, and are joined by question. A grader that the caller brings decides which
candidates are right. Pairs of one question are limited, so that no question outweighs the others.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Protocol

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import BadRow, RowError, made_of
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import PreferencePair, RowIds, pair_of, prompt_group, user_prompt
from laddpo.preference.reading.rows import FIX, RowRules, check_text, get_field

Raw = tuple[str, dict] | BadRow


class Grader(Protocol):
    """`grade_all(texts, answers)` says of each text whether it reaches the answer; `name` is written to manifests."""

    name: str

    def grade_all(self, texts: Sequence[str], answers: Sequence[str]) -> list[bool]: ...


class CandidateTexts:
    """Candidates by question. Texts lie in an unnamed temporary file, their places in memory (8 bytes each)."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (has no name; it is deleted with the object)
        self._places: dict[str, array[int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(self, group: str, text: str) -> None:
        self._places.setdefault(group, array("q")).append(self._file.seek(0, 2))
        self._file.write(json.dumps(text).encode() + b"\n")

    def of(self, group: str) -> Iterator[str]:
        for place in self._places.get(group, ()):
            self._file.seek(place)
            yield json.loads(self._file.readline())

    def counts(self) -> dict[str, int]:
        """Candidates by group."""
        return {group: len(places) for group, places in self._places.items()}


def candidate_pairs(
    rows: Iterable[Raw],
    separate: Iterable[Raw],
    rules: RowRules,
    grader: Grader | None,
    pairs_per_question: int,
    seed: int,
    log: ReadLog,
) -> Iterator[PreferencePair | BadRow]:
    """Pairs of each question, at most `pairs_per_question`, the same ones whatever the order of rows and candidates.

    `separate` are the rows of candidates that are not in the rows of their questions. A question whose candidates
    are all right or all wrong gives no pair and is counted in the report.
    """
    if grader is None:
        raise UserError("Candidates can only be told right from wrong by a grader; none was given.")
    if pairs_per_question < 1:
        raise UserError(f"data.pairs_per_question is {pairs_per_question}; expected 1 or more.")
    texts = CandidateTexts()
    known = set()

    def keep(place: str, fields: dict) -> tuple:
        question, candidate = (read_text(fields, name, rules, log) for name in ("prompt", "candidate"))
        texts.add(prompt_group(user_prompt(question)), candidate)
        return ()

    def pairs(place: str, fields: dict) -> Iterator[PreferencePair]:
        question, answer, candidates = read_question(fields, rules, log, needs_candidates=not texts)
        group = prompt_group(user_prompt(question))
        known.add(group)
        candidates = sorted({*candidates, *texts.of(group)})
        return pair_up(question, answer, candidates, place, grader, pairs_per_question, seed, log)

    yield from made_of(separate, keep)
    yield from made_of(rows, pairs)
    for group, count in texts.counts().items():
        if group not in known:
            log.warn("candidates whose question is not among the questions", count)


def pair_up(
    question: str,
    answer: str,
    candidates: Sequence[str],
    place: str,
    grader: Grader,
    pairs_per_question: int,
    seed: int,
    log: ReadLog,
) -> Iterator[PreferencePair]:
    """Right candidates over wrong ones. Pairs are taken so that candidates repeat as late as possible."""
    is_right = grader.grade_all(candidates, [answer] * len(candidates))
    sides = [
        [text for text, right in zip(candidates, is_right, strict=True) if right is wanted] for wanted in (True, False)
    ]
    if not all(sides):
        missing = "without any candidate" if not candidates else "with no right" if not sides[0] else "with no wrong"
        log.warn(f"questions {missing}{' candidate' if candidates else ''}, which give no pair")
        return
    prompt = user_prompt(question)
    ranked = [sorted(side, key=lambda text: _rank(seed, question, text)) for side in sides]
    # along the diagonals: (0,0) (1,1) (2,2) … then (0,1) (1,2) …
    places = sorted(product(range(len(ranked[0])), range(len(ranked[1]))), key=lambda at: (abs(at[1] - at[0]), at))
    for right, wrong in places[:pairs_per_question]:
        chosen, rejected = ranked[0][right], ranked[1][wrong]
        yield pair_of(RowIds(), prompt, chosen, rejected, place, short_answer(answer))
    if len(places) > pairs_per_question:
        log.warn(
            "pairs left out because their question has more than data.pairs_per_question",
            len(places) - pairs_per_question,
        )


def read_question(row: dict, rules: RowRules, log: ReadLog, needs_candidates: bool) -> tuple[str, str, list[str]]:
    """Question, gold answer and the candidates beside it (none if they are in files of their own)."""
    question, answer = (read_text(row, name, rules, log) for name in ("prompt", "answer"))
    if not needs_candidates and rules.column("candidates") not in row:
        return question, answer, []
    candidates = get_field(row, "candidates", rules)
    if not isinstance(candidates, list) or not all(isinstance(text, str) for text in candidates):
        problem = "is not a list of texts"
        raise RowError(
            "DATA-12", rules.column("candidates"), problem, "Give the candidate solutions as a list of texts."
        )
    for index, text in enumerate(candidates):
        check_text(text, f"{rules.column('candidates')}[{index}]", rules, log.warn)
    return question, answer, candidates


def read_text(row: dict, name: str, rules: RowRules, log: ReadLog) -> str:
    """One field that must be text."""
    value = get_field(row, name, rules)
    if not isinstance(value, str):
        raise RowError("DATA-12", rules.column(name), "is a list, want text", FIX)
    check_text(value, "prompt" if name == "prompt" else rules.column(name), rules, log.warn)
    return value


def short_answer(answer: str) -> str:
    """What follows the last `####` of a worked answer, or all of it."""
    return answer.rpartition("####")[2].strip()


def _rank(seed: int, question: str, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\x00{question}\x00{text}".encode()).digest()
