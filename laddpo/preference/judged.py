"""Preference pairs from a model's own answers as a judge rates them: the best over the worst, or over others.

Rows of samples.jsonl go in, as for laddpo/preference/onpolicy.py, but no right answer is needed. A pair needs ratings
that differ by more than the tie. Which answers make a pair: PAIRINGS, a row each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from laddpo.errors import UserError
from laddpo.preference.candidates import Raw
from laddpo.preference.onpolicy import balanced_pairs, is_text, length_facts
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import PreferencePair, Prompt, RowIds, pair_of, user_prompt

Rated = tuple[str, float]  # an answer and its rating


class Rater(Protocol):
    """`rate(prompt, texts, gold)` gives a number for each text, None where nobody can say; ratings that differ by at
    most `tie` are equal. `fields()` is what they depend on. `finish()` raises if some are missing for now."""

    tie: float

    def rate(self, prompt: Prompt, texts: Sequence[str], gold: str | None) -> list[float | None]: ...

    def fields(self) -> dict[str, Any]: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


def judged_pairs(
    rows: Iterable[Raw],
    rater: Rater,
    pair_by: str,
    pairs_per_question: int,
    seed: int,
    log: ReadLog,
    is_balanced: bool = True,
) -> Iterator[PreferencePair | BadRow]:
    """Pairs of all questions, at most `pairs_per_question` each; what became of the answers goes to
    log.facts["sampling"]."""
    pairs: list[PreferencePair] = []
    facts: Counter[str] = Counter(questions=0, samples=0, unrated=0, ties=0, without_pair=0)
    bests: list[float] = []
    means: list[float] = []
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        place, fields = row
        question, answers = fields["question"], fields["answers"]
        texts, prompt = [text for text in dict.fromkeys(answers) if is_text(text)], user_prompt(question)
        ratings = rater.rate(prompt, texts, fields["answer"]) if texts else []
        rated = [(text, rating) for text, rating in zip(texts, ratings, strict=True) if rating is not None]
        facts.update(questions=1, samples=len(answers), unrated=len(texts) - len(rated))
        if rated:
            bests.append(max(rating for _, rating in rated))
            means.append(sum(rating for _, rating in rated) / len(rated))
        made, ties = chosen_over(rated, pair_by, pairs_per_question, rater.tie, f"{seed}\x00{question}")
        facts.update(ties=ties, without_pair=not made)
        pairs += [pair_of(RowIds(), prompt, *pair, place, fields["answer"]) for pair in made]
    rater.finish()
    kept = balanced_pairs(pairs) if is_balanced else pairs
    log.facts["sampling"] = {
        "questions": facts["questions"],
        "samples": facts["samples"],
        "judge": rater.fields(),
        "pair_by": pair_by,
        "mean_rating": sum(means) / len(means) if means else None,
        "mean_best": sum(bests) / len(bests) if bests else None,
        "without_pair": facts["without_pair"],
        "pairs": len(kept),
        "left_out": {"ties": facts["ties"], "unrated": facts["unrated"], "for_length": len(pairs) - len(kept)},
        **length_facts(kept),
    }
    if not kept:
        raise UserError(
            f"{facts['questions']:,} questions gave no pair: {facts['ties']:,} were ties, {facts['unrated']:,} answers "
            f"have no rating, {len(pairs):,} pairs were left out for their length. Sample more answers "
            "(data.sampling.samples), at a higher data.sampling.temperature, or lower data.judge.tie."
        )
    yield from kept


def chosen_over(
    rated: Sequence[Rated], pair_by: str, limit: int, tie: float, salt: str
) -> tuple[list[tuple[str, str]], int]:
    """(chosen, rejected) of one question, and how many that pair up are ties. Equal ratings are ordered by a hash.

    Example, ratings 3, 1, 2, 2 of a, b, c, d and limit 4: best_worst gives a over b, and c against d is a tie.
    """
    ordered = sorted(rated, key=lambda each: (-each[1], _rank(salt, each[0])))
    made, ties = [], 0
    for better, worse in PAIRINGS[pair_by](ordered, rated, salt):
        if better[1] - worse[1] <= tie:
            ties += 1
        elif len(made) < limit:
            made.append((better[0], worse[0]))
    return made, ties


def _best_worst(ordered: Sequence[Rated], sampled: Sequence[Rated], salt: str) -> list[tuple[Rated, Rated]]:
    return [(ordered[i], ordered[-1 - i]) for i in range(len(ordered) // 2)]


def _best_random(ordered: Sequence[Rated], sampled: Sequence[Rated], salt: str) -> list[tuple[Rated, Rated]]:
    return [(ordered[0], other) for other in sorted(ordered[1:], key=lambda each: _rank(f"{salt}\x00random", each[0]))]


def _best_first(ordered: Sequence[Rated], sampled: Sequence[Rated], salt: str) -> list[tuple[Rated, Rated]]:
    return [(ordered[0], other) for other in sampled if other != ordered[0]]


# Ordered from best to worst, in the order of sampling, and what random orders depend on, to pairs in the order in which
# they are taken. Every text is there once.
PAIRINGS: dict[str, Callable[[Sequence[Rated], Sequence[Rated], str], list[tuple[Rated, Rated]]]] = {
    "best_worst": _best_worst,
    "best_random": _best_random,
    "best_first": _best_first,
}


def judged_lines(facts: dict) -> list[str]:
    """What report_table says of rated samples."""
    judge, left_out = facts["judge"], facts["left_out"]
    name = judge.get("rule") or judge.get("model", "")
    best = f"{facts['mean_rating']:.4g}, of the best {facts['mean_best']:.4g}" if facts["pairs"] else "unknown"
    return [
        f"{facts['questions']:,} questions, {facts['samples']:,} samples, judged by {judge['judge']} {name}: mean "
        f"rating {best}; {facts['without_pair']:,} questions gave no pair",
        f"{facts['pairs']:,} pairs ({facts['pair_by']}); {left_out['ties']:,} ties and {left_out['unrated']:,} answers "
        f"without a rating left out, {left_out['for_length']:,} left out so that length is no signal (chosen longer "
        f"{facts['chosen_longer']:,}, shorter {facts['chosen_shorter']:,})",
    ]


def _rank(salt: str, text: str) -> bytes:
    return hashlib.sha256(f"{salt}\x00{text}".encode("utf-8", "surrogatepass")).digest()
