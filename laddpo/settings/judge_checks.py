"""What the settings of a judge contradict; part of the checks of laddpo/settings/checks.py, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from laddpo.judging.judges import JUDGES, RULES
from laddpo.problems.tasks import JUDGED
from laddpo.settings.judge_schema import JudgeSettings
from laddpo.settings.schema import RunConfig


def judge_problems(config: RunConfig) -> Iterator[str]:
    """A sentence or two for each contradiction of evaluation.judge and data.judge."""
    evaluation, data = config.evaluation, config.data
    is_judged = evaluation.harness == "none" and JUDGED in evaluation.tasks
    if is_judged:
        if evaluation.judge.kind == "none":
            yield (
                f"evaluation.tasks has {JUDGED} and evaluation.judge.kind is 'none'; expected who judges: "
                f"{', '.join(JUDGES)}; write evaluation.judge.kind=rule evaluation.judge.rule=shorter, for instance."
            )
        yield from _of_kind(evaluation.judge, "evaluation.judge")
    if is_judged and evaluation.judge.kind == "rule" and evaluation.judge.rule == "marks":
        yield "evaluation.judge.rule is 'marks', which only data.judge has; write evaluation=rubric to count marks."
    if "onpolicy" not in {data.source, *(part.source for part in data.mixture)}:
        return
    if data.judge.kind != "none":
        yield from _of_kind(data.judge, "data.judge")
    if data.judge.kind == "rule" and data.judge.rule == "marks" and (data.problems != "rubric" or data.dataset_name):
        yield (
            "data.judge.rule is 'marks' and the questions are not those of data.problems=rubric, the only ones with "
            "marks; write data=rubric, or data.judge.rule=right."
        )
    if data.judge.kind == "rule" and data.balance_lengths and RULES.get(data.judge.rule, RULES["right"]).is_length:
        yield (
            f"data.judge.rule is {data.judge.rule!r} and data.balance_lengths is true, which leaves out pairs until "
            "length tells nothing; write data.balance_lengths=false."
        )


def _of_kind(judge: JudgeSettings, key: str) -> Iterator[str]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", judge.device):
        yield f"{key}.device is {judge.device!r}; expected auto, cpu, cuda, or one GPU such as cuda:1; write one."
    if judge.kind == "reward_model" and not judge.model:
        yield (
            f"{key}.model is not set and {key}.kind is 'reward_model'; expected a folder or hub id of a sequence "
            f"classifier; add {key}.model=path/to/reward_model."
        )
    rule = RULES.get(judge.rule)
    if judge.kind != "rule" or rule is None or not rule.needs_pattern:
        return
    if not judge.pattern:
        yield (
            f"{key}.pattern is not set and {key}.rule is {judge.rule!r}; expected a regular expression; add "
            f"{key}.pattern='[.!?]$', for instance."
        )
        return
    try:
        re.compile(judge.pattern)
    except re.error as error:
        yield f"{key}.pattern is {judge.pattern!r}, which is no regular expression: {error}; correct it."
