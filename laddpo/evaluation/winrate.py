"""Base against tuned answers to the same prompts, compared by a judge: how often the tuned model's answer is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.errors import UserError
from laddpo.inputs.judge import Surroundings, open_judge
from laddpo.judging.judges import Answered, Verdict
from laddpo.preference.reading.pairs import prompt_group, prompt_of
from laddpo.problems.tasks import JUDGED, Item, Task, grader_of
from laddpo.results.stats import compare
from laddpo.settings.judge_schema import needs_gold
from laddpo.settings.schema import EvaluationSettings
from laddpo.storage.seals import CheckedLines

WINS = {1.0: "win", 0.5: "tie", 0.0: "loss"}  # of the tuned model
VERDICT = "verdict"  # stands in items.jsonl where answers have the model's name
Record = Mapping[str, Any]


def with_prompts(tasks: Sequence[Task], prepared: Any, evaluation: EvaluationSettings) -> list[Task]:
    """The tasks; one of judged answers without prompts of its own asks the held-out ones of the run, each once.

    Raises UserError where the judge needs right answers and a prompt has none.
    """
    found = [
        _held_out(task, prepared, evaluation) if task.name == JUDGED and not task.items else task for task in tasks
    ]
    for task in found:
        lacking = [item.id for item in task.items if not item.answer]
        if task.name == JUDGED and needs_gold(evaluation.judge) and lacking:
            raise UserError(
                f"evaluation.judge.rule is {evaluation.judge.rule!r}, which needs right answers, and "
                f"{len(lacking):,} of {len(task.items):,} prompts have none, the first {lacking[0]}. Name their column "
                "by data.columns.answer, give a file with answers as evaluation.dataset_name, or set another judge: "
                "evaluation.judge.rule=shorter, evaluation.judge.kind=reward_model."
            )
    return found


def _held_out(task: Task, prepared: Any, evaluation: EvaluationSettings) -> Task:
    items: dict[str, Item] = {}
    for row in prepared.texts(prepared.result_split):
        prompt = prompt_of(row["prompt"])
        name = f"{JUDGED}-{prompt_group(prompt)}"
        items.setdefault(name, Item(name, prompt, row.get("answer") or ""))
        if len(items) == evaluation.limit:
            break
    if not items:
        raise UserError(
            f"{prepared.folder}: holds no held-out row, and evaluation.tasks has {JUDGED}, which asks their prompts. "
            "Set evaluation.dataset_name to a file of prompts, or hold rows out with data.test_fraction."
        )
    asked = list(items.values())
    fields = {"source": f"held-out prompts ({prepared.result_split})", "items": len(asked)}
    return replace(task, items=asked, grader=grader_of(asked, evaluation.grader), fields=fields)


def judge_answers(
    evaluation: EvaluationSettings,
    task: Task,
    base: Sequence[Record],
    tuned: Sequence[Record],
    items_path: Path,
    seed: int,
    around: Surroundings,
) -> dict[str, Any]:
    """The entry of results.json. A line for each prompt is added to items.jsonl."""
    contests = [
        tuple(Answered(item.prompt, record["text"], item.answer or None) for record in pair)
        for item, *pair in zip(task.items, tuned, base, strict=True)
    ]
    judge = open_judge(evaluation.judge, replace(around, grade=task.grader.grade_all, grader=task.grader.name))
    try:
        verdicts = judge.compare(contests)
    finally:
        judge.close()
        task.grader.close()
    _write(items_path, task, verdicts, judge.fields())
    return win_rate(verdicts, contests, seed) | {"judge": judge.fields(), "prompts": dict(task.fields)}


def win_rate(verdicts: Sequence[Verdict], contests: Sequence[tuple[Answered, Answered]], seed: int) -> dict[str, Any]:
    """(wins + ties / 2) / prompts with a verdict, with intervals; and the lengths of the answers, as a judge may prefer
    long ones. The first answer of a contest is the tuned model's."""
    decided = [(v.outcome, *pair) for v, pair in zip(verdicts, contests, strict=True) if v.outcome is not None]
    unjudged = Counter(verdict.why for verdict in verdicts if verdict.outcome is None)
    if not decided:
        counts = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in unjudged.items())
        told = next((f" {v.details['problem']}" for v in verdicts if "problem" in v.details), "")
        raise UserError(
            f"the judge gave no verdict on any of {len(verdicts):,} prompts ({counts}).{told} A rule `right` needs an "
            "answer beside each prompt, a reward model answers of at most evaluation.judge.max_length tokens, and an "
            "endpoint's reply one of its marks. Answers are kept: change evaluation.judge and run evaluate."
        )
    outcomes = [outcome for outcome, *_ in decided]
    entry = compare([0.5] * len(decided), outcomes, np.random.default_rng(seed), is_share=True, is_base_known=True)
    longer = [
        (outcome == 1) == (len(tuned.text) > len(base.text))
        for outcome, tuned, base in decided
        if outcome != 0.5 and len(tuned.text) != len(base.text)
    ]
    lengths = [np.mean([len(answer.text) for answer in side]) for side in zip(*contests, strict=True)]
    return {
        **entry,
        "wins": outcomes.count(1.0),
        "ties": outcomes.count(0.5),
        "losses": outcomes.count(0.0),
        "unjudged": dict(unjudged),
        "longer_won": float(np.mean(longer)) if longer else None,
        "mean_characters": {"base": float(lengths[1]), "tuned": float(lengths[0])},
    }


def _write(path: Path, task: Task, verdicts: Sequence[Verdict], about: dict[str, Any]) -> None:
    """A line for each prompt behind the answers, in the place of those that were there."""
    log = CheckedLines(path)
    log.rewind(lambda record: record.get("model") != VERDICT)
    for item, verdict in zip(task.items, verdicts, strict=True):
        found = WINS.get(verdict.outcome, verdict.why)
        log.append({"task": task.name, "model": VERDICT, "id": item.id, "verdict": found, **verdict.details})
    log.sync()
