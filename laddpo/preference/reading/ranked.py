"""Pairs out of rows that hold more than a pair: scores, ranks, several answers, a strength, a weight, a margin.

`PairMaker.pairs(row)` gives each pair of a row as a row with one chosen and one rejected answer, which the shapes of
rows.py read. Scores: more is better. Ranks: 1 is the best, read only where a setting names their column. Nothing is
turned round in silence: a pair whose chosen answer scored lower is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.guesses import RANKS, plain_name
from laddpo.preference.reading.pairs import prompt_rows
from laddpo.preference.reading.rows import MANY, RowRules, one_pair_each, read_dialogue
from laddpo.preference.reading.texts import kind_of
from laddpo.preference.reading.unread import OF_ANSWERS, is_mapped

PAIRS_FROM = {
    "all": lambda order: combinations(order, 2),
    "best_rest": lambda order: ((order[0], other) for other in order[1:]),
    "best_worst": lambda order: [(order[0], order[-1])] if order[1:] else [],
}
SIGNS = {"scores": 1.0, "ranks": -1.0}


@dataclass(frozen=True)
class PairRule:
    """`pairs_from`: which answers of a list make pairs. `min_gap`: the least difference of scores; None: score_chosen
    and score_rejected are not read. `margin_per_gap`: the margin in the loss for each point of difference."""

    pairs_from: str = "all"
    min_gap: float | None = 0.0
    margin_per_gap: float = 0.0


@dataclass(frozen=True)
class Made:
    """One pair of a row: its fields, its weight and its margin in the loss."""

    fields: dict
    weight: float = 1.0
    margin: float = 0.0


class PairMaker:
    """Makes the pairs of one source's rows and counts what became of them in `log.pairs`."""

    def __init__(self, rules: RowRules, rule: PairRule, log: ReadLog):
        if rules.columns.get("scores") and rules.columns.get("ranks"):
            raise UserError(
                "data.columns.scores and data.columns.ranks are both set; of scores the highest is best, of ranks the "
                "lowest. Leave one of them out."
            )
        self._rules, self._rule, self._log = rules, rule, log
        self._counts = log.pairs.counts
        log.pairs.rules.add(rule)
        self._rows = self._lists = self._scored = self._swapped = 0

    def pairs(self, row: dict) -> Iterator[Made]:
        """The pairs of a row. RowError: the row, or what is left of it, cannot be used."""
        weight = own_weight(row, self._rules)
        margin = _own_number(row, self._rules, "margin", 0.0, "0 or more", lambda value: value >= 0)
        is_list = self._rules.column("candidates") in row and row.get(self._rules.column("chosen")) is None
        if not is_list and self._rules.column("candidates") in row:
            self._log.warn(f"column {self._rules.column('candidates')!r} is not used")
        self._rows += 1
        self._lists += is_list
        for fields, gap in self._of_list(row) if is_list else self._of_pair(row):
            if gap is not None and gap < (self._rule.min_gap or 0.0):
                self._counts["below_gap"] += 1
                continue
            whole = margin + self._rule.margin_per_gap * (gap or 0.0)
            self._log.pairs.add(gap, weight, whole)
            self._counts["pairs"] += gap is not None or is_list
            yield Made(fields, weight, whole)

    def finish(self) -> None:
        """Raise UserError if most pairs with scores have the lower one on the chosen side, or if a setting names what
        each answer of a list has and no row has a list."""
        named = [name for name in OF_ANSWERS if is_mapped(name, self._rules.columns.get(name))]
        if named and self._rows and not self._lists:
            raise UserError(
                f"data.columns.{named[0]} is {self._rules.column(named[0])!r}, and no row is a list of answers in "
                f"{self._rules.column('candidates')!r}. Name it by data.columns.candidates, or leave "
                f"data.columns.{named[0]} out."
            )
        if self._swapped * 2 > self._scored:
            raise UserError(
                f"In {self._swapped:,} of {self._scored:,} pairs {self._rules.column('score_chosen')} is below "
                f"{self._rules.column('score_rejected')} (DATA-109): the columns are probably swapped, or a low score "
                "is good. Swap data.columns.chosen and data.columns.rejected, or set data.min_gap=null to use the "
                "pairs without their scores."
            )

    def _of_pair(self, row: dict) -> Iterator[tuple[dict, float | None]]:
        """A chosen answer with one or several rejected ones."""
        row, gap = self._in_order(row)
        if row is None:
            return
        found = [(each, score if gap is None else gap) for each, score in self._against_each(row)]
        if self._rule.pairs_from == "best_worst" and found[1:]:
            if any(gap is None for _, gap in found):
                problem = "is a list of answers without scores, and data.pairs_from=best_worst takes the worst of them"
                raise RowError("DATA-111", self._rules.column("rejected"), problem, "Set data.columns.score_rejected.")
            found = [max(found, key=lambda pair: pair[1])]
        self._counts["equal"] += sum(gap == 0 for _, gap in found)
        yield from found

    def _in_order(self, row: dict) -> tuple[dict | None, float | None]:
        """The row with its better answer as chosen, and the strength, if it has a column of signed strengths."""
        strength = _own_number(row, self._rules, "preference", None)
        if strength is None:
            return row, None
        if strength == 0:
            self._counts["ties"] += 1
            return None, None
        chosen, rejected = self._rules.column("chosen"), self._rules.column("rejected")
        if strength > 0 and chosen in row and rejected in row:
            row = {**row, chosen: row[rejected], rejected: row[chosen]}
        return row, abs(strength)

    def _against_each(self, row: dict) -> list[tuple[dict, float | None]]:
        each = one_pair_each(row, self._rules, self._log.warn)
        names = [self._rules.columns.get(name) for name in ("score_chosen", "score_rejected")]
        if self._rule.min_gap is None or not all(names):
            return [(fields, None) for fields in each]
        chosen, rejected = (row.get(name) for name in names)
        rejected = rejected if isinstance(rejected, list) else [rejected] * len(each)
        if len(rejected) != len(each):
            problem = f"has {len(rejected)} scores for {len(each)} rejected answers"
            raise RowError("DATA-110", names[1], problem, "Give one score for each answer, in the same order.")
        return [(fields, self._gap(chosen, score, names)) for fields, score in zip(each, rejected, strict=True)]

    def _gap(self, chosen: Any, rejected: Any, names: Sequence[str]) -> float | None:
        if chosen is None or rejected is None:
            if self._rule.min_gap or self._rule.margin_per_gap:
                name = names[0] if chosen is None else names[1]
                raise RowError("DATA-110", name, "has no score", "Give one, or set data.min_gap=null.")
            self._counts["without_scores"] += 1
            return None
        gap = number(chosen, names[0]) - number(rejected, names[1])
        self._scored += 1
        if gap < 0:
            self._swapped += 1
            problem = f"is below {names[1]}: the answer that is chosen scored lower"
            raise RowError("DATA-109", names[0], problem, "Swap or remove the row, or set data.min_gap=null.")
        return gap

    def _of_list(self, row: dict) -> Iterator[tuple[dict, float | None]]:
        """Pairs of a list of answers, the better one chosen."""
        column = self._rules.column("candidates")
        answers = row[column]
        if not isinstance(answers, list) or not answers:
            problem = f"is {kind_of(answers) if answers != [] else 'an empty list'}, want a list of answers"
            raise RowError("DATA-110", column, problem, "Give a list of texts, of messages, or of objects.")
        scores = self._scores(row, answers)
        texts = [self._text(answer, f"{column}[{index}]") for index, answer in enumerate(answers)]
        self._counts["lists"] += 1
        self._counts["answers"] += len(answers)
        order = sorted(range(len(answers)), key=lambda index: -scores[index])
        row = {name: value for name, value in row.items() if name != column}
        for better, worse in PAIRS_FROM[self._rule.pairs_from](order):
            if scores[better] == scores[worse]:
                self._counts["ties"] += 1
            elif texts[better] == texts[worse]:
                self._counts["same_text"] += 1
            else:
                yield self._as_pair(row, texts[better], texts[worse]), scores[better] - scores[worse]

    def _as_pair(self, row: dict, better: Any, worse: Any) -> dict:
        """The row with two of its answers. A prompt "\\n\\nHuman: …\\n\\nAssistant:" becomes its turns."""
        prompt = row.get(self._rules.column("prompt"))
        if isinstance(prompt, str) and prompt.startswith("\n\nHuman:") and isinstance(better, str):
            turns = read_dialogue(prompt, "prompt")
            turns = turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns
            better, worse = ([{"role": "assistant", "content": text}] for text in (better, worse))
            row = {**row, self._rules.column("prompt"): prompt_rows(turns)}
        return {**row, self._rules.column("chosen"): better, self._rules.column("rejected"): worse}

    def _text(self, answer: Any, place: str) -> Any:
        if not isinstance(answer, dict):
            return answer
        key = self._rules.column("candidate")
        if key not in answer:
            problem = f"has the keys {sorted(map(str, answer))[:12]} and no {key!r}"
            raise RowError("DATA-110", place, problem, "Set data.columns.candidate to the key of the answer's text.")
        return answer[key]

    def _scores(self, row: dict, answers: list) -> list[float]:
        """A number for each answer, more is better: out of a list beside them, or out of a key of each."""
        name = next((name for name in SIGNS if self._rules.columns.get(name)), None)
        if name is None:
            raise RowError("DATA-111", self._rules.column("candidates"), *_unscored(row, answers))
        column = self._rules.column(name)
        if column in row:
            values = row[column]
        elif all(isinstance(answer, dict) and column in answer for answer in answers):
            values = [answer[column] for answer in answers]
        else:
            problem = f"is neither a field of the row nor of each answer (data.columns.{name})"
            raise RowError("DATA-110", column, problem, "Give every answer one, or remove the row.")
        if not isinstance(values, list) or len(values) != len(answers):
            found = f"{len(values)} values" if isinstance(values, list) else kind_of(values)
            problem = f"is {found}, want a list of {len(answers)} numbers, one for each answer"
            raise RowError("DATA-110", column, problem, "Give one number for each answer, in the same order.")
        return [SIGNS[name] * number(value, f"{column}[{index}]") for index, value in enumerate(values)]


def own_weight(row: dict, rules: RowRules) -> float:
    """The row's weight in the loss; 1 where no column is named. Raises RowError."""
    return _own_number(row, rules, "weight", 1.0, "more than 0", lambda value: value > 0)


def _own_number(row: dict, rules: RowRules, name: str, default: Any, wanted: str = "", holds: Any = None) -> Any:
    """The number in a column that is read only where a setting names it."""
    if not (column := rules.columns.get(name)):
        return default
    value = number(row.get(column), column)
    if holds and not holds(value):
        raise RowError("DATA-110", column, f"is {value:g}, want {wanted} (data.columns.{name})", "Mend the row.")
    return value


def refuse_unused(log: ReadLog) -> None:
    """Raise UserError if a rule for scores or lists of answers was set and no row had any."""
    made, plain = log.pairs, PairRule()
    has_list = MANY in log.warnings or made.counts["lists"]
    for rule in made.rules:
        if rule.pairs_from != plain.pairs_from and not has_list:
            raise UserError(f"data.pairs_from is {rule.pairs_from!r}, and no row has a list of answers. Leave it out.")
        for name in ("min_gap", "margin_per_gap"):
            if getattr(rule, name) and not made.values["gap"] and not made.counts["below_gap"]:
                raise UserError(
                    f"data.{name} is {getattr(rule, name):g}, and no pair has scores. Name their columns by "
                    "data.columns.score_chosen and data.columns.score_rejected, or data.columns.scores."
                )


def number(value: Any, place: str) -> float:
    """A finite number, or a text of one as in a .csv."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        shown = repr(value)[:40] if isinstance(value, str) else kind_of(value)
        raise RowError("DATA-110", place, f"is {shown}, want a finite number", "Mend the row, or remove it.")
    return found


def _unscored(row: dict, answers: list) -> tuple[str, str]:
    """What is wrong with a list of answers whose scores nobody named, and what to do."""
    inside = [key for answer in answers[:1] if isinstance(answer, dict) for key in answer]
    ranks = next((key for key in (*row, *inside) if plain_name(key) in RANKS), None)
    if ranks is not None:
        return (
            f"is a list of answers with {ranks!r}, and it is not said whether a low or a high one is good",
            f"Set data.columns.ranks={ranks} if 1 is the best, data.columns.scores={ranks} if more is better.",
        )
    return "is a list of answers without scores or ranks", "Set data.columns.scores or data.columns.ranks."
