"""Preference pairs from a model's own answers: right over wrong answers to the same question, length no signal.

Rows of samples.jsonl go in (question, gold answer, several sampled answers; laddpo/evaluation/samples.py writes them),
pairs come out. Pairs of a question are few and matched in length; over all of them the chosen answer is as often the
longer as the shorter one. The report gives the model's pass@1 and pass@k on the samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from laddpo.errors import UserError
from laddpo.preference.candidates import Grader, Raw, read_text, short_answer
from laddpo.preference.reading.bad_rows import BadRow, BadRows, made_of
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import PreferencePair, RowIds, pair_of, user_prompt
from laddpo.preference.reading.rows import RowRules


@dataclass(frozen=True)
class Question:
    """A question as it is asked, and its gold answer, where it is known."""

    text: str
    answer: str | None


def read_questions(
    rows: Iterable[Raw], rules: RowRules, instruction: str, log: ReadLog, needs_answer: bool = True
) -> list[Question]:
    """The questions of rows with a question and, if it is needed, a gold answer; a UserError lists the rows that lack
    either.

    `instruction` is put behind every question, as the evaluation of the task does. Equal questions are asked once.
    """
    found: dict[str, Question] = {}
    bad = BadRows()

    def keep(place: str, fields: dict) -> tuple:
        text = read_text(fields, "prompt", rules, log)
        answer = short_answer(read_text(fields, "answer", rules, log)) if needs_answer else None
        found.setdefault(text, Question(text + instruction, answer))
        return ()

    for row in made_of(rows, keep):
        bad.add(row)
    if bad.total:
        raise UserError("\n".join([f"{bad.total:,} questions cannot be used:", *(f"  {line}" for line in bad.lines())]))
    return list(found.values())


def sampled_pairs(
    rows: Iterable[Raw],
    grader: Grader | None,
    pairs_per_question: int,
    seed: int,
    log: ReadLog,
    is_balanced: bool = True,
) -> Iterator[PreferencePair | BadRow]:
    """Pairs of all questions, at most `pairs_per_question` each; counts and pass rates go to log.facts["sampling"]."""
    if grader is None:
        raise UserError("Sampled answers can only be told right from wrong by a grader; none was given.")
    pairs: list[PreferencePair] = []
    facts: Counter[str] = Counter(questions=0, samples=0, right=0, solved=0, always_right=0, never_right=0, too_many=0)
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        place, fields = row
        question, answer, answers = fields["question"], fields["answer"], fields["answers"]
        distinct = sorted(set(answers))
        is_right = dict(zip(distinct, grader.grade_all(distinct, [answer] * len(distinct)), strict=True))
        right, wrong = (
            [text for text in distinct if is_right[text] is wanted and is_text(text)] for wanted in (True, False)
        )
        rights = sum(is_right[text] for text in answers)
        facts.update(questions=1, samples=len(answers), right=rights, solved=bool(rights))
        facts.update(always_right=rights == len(answers), never_right=not rights)
        facts.update(too_many=max(0, len(right) * len(wrong) - pairs_per_question))
        prompt = user_prompt(question)
        for chosen, rejected in matched_pairs(right, wrong, pairs_per_question, f"{seed}\x00{question}"):
            pairs.append(pair_of(RowIds(), prompt, chosen, rejected, place, answer))
    kept = balanced_pairs(pairs) if is_balanced else pairs
    log.facts["sampling"] = _facts(facts, pairs, kept)
    if not kept:
        raise UserError(
            f"{facts['questions']:,} questions gave no pair: {facts['always_right']:,} were always answered right, "
            f"{facts['never_right']:,} never, {len(pairs):,} pairs were left out for their length. Sample more answers "
            "(data.sampling.samples), at a higher data.sampling.temperature, or ask other questions."
        )
    yield from kept


def is_text(answer: str) -> bool:
    """Whether an answer can be trained on unchanged: it is not blank and holds no bytes that are no characters."""
    return bool(answer.strip()) and not set(answer) & {"\ufffd", "\x00"}


def matched_pairs(right: Sequence[str], wrong: Sequence[str], limit: int, salt: str) -> list[tuple[str, str]]:
    """At most `limit` pairs: every text as seldom as possible, then the pair nearest in length, then by a hash."""
    uses: Counter[str] = Counter()
    rest = [(chosen, rejected) for chosen in right for rejected in wrong]
    taken: list[tuple[str, str]] = []
    while rest and len(taken) < limit:
        best = min(rest, key=lambda p: (uses[p[0]] + uses[p[1]], abs(len(p[0]) - len(p[1])), _rank(salt, p)))
        rest.remove(best)
        uses.update(best)
        taken.append(best)
    return taken


def balanced_pairs(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs without the surplus of one sign of the difference in length; the largest differences go first."""
    longer, shorter = (sorted(_of_sign(pairs, sign), key=_difference) for sign in (1, -1))
    surplus = max(longer, shorter, key=len)[min(len(longer), len(shorter)) :]
    left_out = {pair.id for pair in surplus}
    return [pair for pair in pairs if pair.id not in left_out]


def _facts(counts: Counter[str], made: Sequence[PreferencePair], kept: Sequence[PreferencePair]) -> dict:
    questions, samples = counts["questions"], counts["samples"]
    return {
        "questions": questions,
        "samples": samples,
        "samples_per_question": samples / questions if questions else 0,
        "pass@1": counts["right"] / samples if samples else None,
        "pass@k": counts["solved"] / questions if questions else None,
        "always_right": counts["always_right"],
        "never_right": counts["never_right"],
        "pairs": len(kept),
        "left_out": {"more_than_pairs_per_question": counts["too_many"], "for_length": len(made) - len(kept)},
        **length_facts(kept),
    }


def length_facts(kept: Sequence[PreferencePair]) -> dict:
    """Whether length tells the chosen from the rejected answer."""
    mean = {
        side: round(sum(len(getattr(pair, side)) for pair in kept) / len(kept), 3) if kept else None
        for side in ("chosen", "rejected")
    }
    return {
        "chosen_longer": len(_of_sign(kept, 1)),
        "chosen_shorter": len(_of_sign(kept, -1)),
        "mean_characters": mean,
    }


def sampling_lines(facts: dict) -> list[str]:
    """What report_table says of the samples."""
    k, left_out = facts["samples_per_question"], facts["left_out"]
    return [
        f"{facts['questions']:,} questions x {k:g} samples: pass@1 {facts['pass@1']:.1%}, pass@{k:g} "
        f"{facts['pass@k']:.1%}; {facts['always_right']:,} always right, {facts['never_right']:,} never: no pair",
        f"{facts['pairs']:,} pairs; {left_out['more_than_pairs_per_question']:,} more than data.pairs_per_question, "
        f"{left_out['for_length']:,} left out so that length is no signal (chosen longer {facts['chosen_longer']:,}, "
        f"shorter {facts['chosen_shorter']:,})",
    ]


def _of_sign(pairs: Sequence[PreferencePair], sign: int) -> list[PreferencePair]:
    return [pair for pair in pairs if (len(pair.chosen) - len(pair.rejected)) * sign > 0]


def _difference(pair: PreferencePair) -> tuple[int, str]:
    return abs(len(pair.chosen) - len(pair.rejected)), pair.id


def _rank(salt: str, pair: tuple[str, str]) -> bytes:
    return hashlib.sha256("\x00".join((salt, *pair)).encode("utf-8", "surrogatepass")).digest()
