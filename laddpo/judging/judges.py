"""Which of two answers to a prompt is better: JUDGES lists what can decide, RULES the rules that need no model.

A judge that gives scores prefers the higher one; a difference of at most `tie` is a tie. A judge that only compares
(an endpoint) rates the answers to one prompt by a bounded number of comparisons. Nothing heavy is imported here, so
that settings can read the tables.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from laddpo.preference.reading.pairs import Prompt

NO_VERDICT, FAILED = "no_verdict", "failed"  # why a contest has no outcome


@dataclass(frozen=True)
class Answered:
    """One answer to a prompt. `gold`: the right answer, where it is known."""

    prompt: Prompt
    text: str
    gold: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`outcome`: 1 if the first answer is better, 0 if the second is, 0.5 for a tie, None if nobody can say; `why` says
    then what is missing. `details` are written beside it."""

    outcome: float | None
    why: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    """`fields()` names everything that the verdicts depend on. `finish()` raises if a rating is missing only for now.
    `close()` ends what the judge has started."""

    def fields(self) -> dict[str, Any]: ...

    def compare(self, contests: Sequence[tuple[Answered, Answered]]) -> list[Verdict]: ...

    def rate(self, answers: Sequence[Answered]) -> list[float | None]: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


Score = Callable[[Sequence[Answered]], "list[float | None]"]  # None: this answer cannot be scored


class ScoringJudge:
    """The higher score wins. `about` are the fields of the judge without the tie."""

    def __init__(self, about: dict[str, Any], score: Score, tie: float = 0.0, close: Callable[[], None] | None = None):
        self.about, self.score, self.tie, self._close = about, score, tie, close

    def fields(self) -> dict[str, Any]:
        return {**self.about, "tie": self.tie}

    def compare(self, contests: Sequence[tuple[Answered, Answered]]) -> list[Verdict]:
        scores = self.score([answer for pair in contests for answer in pair])
        both = zip(scores[::2], scores[1::2], contests, strict=True)
        # equal answers may differ by rounding, where they were scored in batches of other lengths
        return [self._verdict(a, a if one.text == other.text else b) for a, b, (one, other) in both]

    def _verdict(self, first: float | None, second: float | None) -> Verdict:
        details = {"scores": [first, second]}
        if first is None or second is None:
            return Verdict(None, FAILED, details)
        return Verdict(0.5 if abs(first - second) <= self.tie else float(first > second), "", details)

    def rate(self, answers: Sequence[Answered]) -> list[float | None]:
        return self.score(answers)

    def finish(self) -> None:
        """Nothing is ever missing."""

    def close(self) -> None:
        if self._close:
            self._close()


def rating(compare: Callable, answers: Sequence[Answered], comparisons: int, salt: str) -> list[float | None]:
    """The share of its contests that each answer wins, a tie as one half; None for one that has no verdict.

    At most `comparisons` contests, spread evenly: each answer against its neighbour in a ring whose order comes from a
    hash, then against the one after that.
    """
    pairs = ring(len(answers), comparisons)
    key = [hashlib.sha256(f"{salt}\x00{a.text}".encode("utf-8", "surrogatepass")).digest() for a in answers]
    order = sorted(range(len(answers)), key=key.__getitem__)
    contests = [(order[i], order[j]) for i, j in pairs]
    won: list[list[float]] = [[] for _ in answers]
    verdicts = compare([(answers[i], answers[j]) for i, j in contests])
    for (i, j), verdict in zip(contests, verdicts, strict=True):
        if verdict.outcome is not None:
            won[i].append(verdict.outcome)
            won[j].append(1 - verdict.outcome)
    return [sum(each) / len(each) if each else None for each in won]


def ring(count: int, limit: int) -> list[tuple[int, int]]:
    """At most `limit` different pairs of 0 … count - 1: neighbours in a circle first, then those two apart, …"""
    pairs = [(i, (i + step) % count) for step in range(1, count // 2 + 1) for i in range(count)]
    distinct = {frozenset(pair): pair for pair in reversed(pairs)}  # half a circle apart, each comes twice
    return [pair for pair in pairs if distinct[frozenset(pair)] == pair][:limit]


def rule_score(rule: str, pattern: str | None, grade: Callable | None) -> Score:
    """The scores of a rule. `grade(texts, gold answers)` is what `right` asks."""
    return RULES[rule].score(pattern, grade)


def _right(pattern: str | None, grade: Callable | None) -> Score:
    def score(answers: Sequence[Answered]) -> list[float | None]:
        known = [answer for answer in answers if answer.gold is not None]
        right = iter(grade([answer.text for answer in known], [answer.gold for answer in known]))
        return [None if answer.gold is None else float(next(right)) for answer in answers]

    return score


def _length(sign: int) -> Callable[[str | None, Callable | None], Score]:
    return lambda pattern, grade: lambda answers: [float(sign * len(answer.text)) for answer in answers]


def _pattern(wanted: bool) -> Callable[[str | None, Callable | None], Score]:
    def make(pattern: str | None, grade: Callable | None) -> Score:
        found = re.compile(pattern or "")
        return lambda answers: [float(bool(found.search(answer.text)) is wanted) for answer in answers]

    return make


@dataclass(frozen=True)
class Rule:
    """`score(pattern, grade)` makes the scores. `needs_gold`: only prompts with a right answer can be judged.
    `is_partial`: `grade` counts marks of a problem that has several."""

    score: Callable[[str | None, Callable | None], Score]
    needs_gold: bool = False
    needs_pattern: bool = False
    is_length: bool = False
    is_partial: bool = False


RULES: dict[str, Rule] = {
    "right": Rule(_right, needs_gold=True),
    "marks": Rule(_right, needs_gold=True, is_partial=True),
    "shorter": Rule(_length(-1), is_length=True),
    "longer": Rule(_length(1), is_length=True),
    "must_match": Rule(_pattern(True), needs_pattern=True),
    "must_not_match": Rule(_pattern(False), needs_pattern=True),
}


@dataclass(frozen=True)
class JudgeKind:
    """A row of JUDGES. `reads`: its settings; `has_scores`: it scores single answers, so that a tie is a difference;
    `rates`: the settings that it reads only to rate several answers to one prompt."""

    reads: tuple[str, ...]
    has_scores: bool = True
    rates: tuple[str, ...] = ()


JUDGES: dict[str, JudgeKind] = {
    "rule": JudgeKind(("rule", "pattern", "tie")),
    "reward_model": JudgeKind(("model", "revision", "label", "device", "batch_size", "max_length", "tie")),
    "endpoint": JudgeKind(
        ("prompt", "temperature", "max_tokens", "parallel", "timeout_s", "retries", "wait_s", "max_failures"),
        has_scores=False,
        rates=("comparisons", "tie"),
    ),
}
