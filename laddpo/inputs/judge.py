"""The judge that evaluation.judge or data.judge names: checked before anything else, opened where it is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from laddpo.judging.endpoint import EndpointJudge, JudgePrompt
from laddpo.judging.judges import RULES, Answered, Judge, ScoringJudge, rule_score
from laddpo.judging.kept import Kept
from laddpo.judging.server import Patience, server_of
from laddpo.preference.reading.pairs import Prompt
from laddpo.settings.judge_schema import JudgeSettings, RatingSettings


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a judge is opened with beside its settings. `key` names the settings in messages. `seed` orders
    the contests between several answers. `close` ends what `grade` needs."""

    key: str
    data_dir: Path
    device: str = "cpu"
    grade: Callable | None = None
    grader: str = ""
    stop: Any = None
    seed: int = 0
    close: Callable | None = None


class OpenRater:
    """A judge that rates several answers to one prompt; see laddpo/preference/judged.py."""

    def __init__(self, judge: Judge, tie: float):
        self.judge, self.tie = judge, tie
        self.fields, self.close, self.finish = judge.fields, judge.close, judge.finish

    def rate(self, prompt: Prompt, texts: Sequence[str], gold: str | None) -> list[float | None]:
        """A number for each text."""
        return self.judge.rate([Answered(prompt, text, gold) for text in texts])


def open_rater(settings: RatingSettings, around: Surroundings) -> OpenRater:
    """The judge as a rater. What it lacks is refused here."""
    check_judge(settings, around.key)
    return OpenRater(open_judge(settings, around), settings.tie)


def check_judge(settings: JudgeSettings, key: str) -> None:
    """Refuse early what the judge cannot work with: variables of the environment, its prompt, its weights."""
    if settings.kind == "endpoint":
        server_of()
        JudgePrompt(settings.prompt, key)
    if settings.kind == "reward_model":
        _fingerprint(settings, key)


def open_judge(settings: JudgeSettings, around: Surroundings) -> Judge:
    """The judge. A reward model is loaded when it is first asked something new."""
    return OPENERS[settings.kind](settings, around)


def _rule(settings: JudgeSettings, around: Surroundings) -> Judge:
    rule = RULES[settings.rule]
    pattern = settings.pattern if rule.needs_pattern else None
    about: dict[str, Any] = {"judge": "rule", "rule": settings.rule}
    if rule.needs_pattern:
        about["pattern"] = pattern
    if rule.needs_gold:
        about["grader"] = around.grader
    return ScoringJudge(about, rule_score(settings.rule, pattern, around.grade), settings.tie, around.close)


def _reward_model(settings: JudgeSettings, around: Surroundings) -> Judge:
    from laddpo.judging.reward_model import RewardModel

    weights, max_length = _fingerprint(settings, around.key), settings.max_length
    said = {"weights": weights, "label": settings.label, "max_length": max_length}
    name = Path(settings.model).name if Path(settings.model).expanduser().is_dir() else settings.model
    kept = Kept(around.data_dir, {"judge": "reward_model", **said})
    device = around.device if settings.device == "auto" else settings.device
    place = (settings.model, settings.revision, settings.label, device)
    model = RewardModel(*place, settings.batch_size, max_length, kept, around.key)
    return ScoringJudge({"judge": "reward_model", "model": name, **said}, model.scores, settings.tie, model.close)


def _endpoint(settings: JudgeSettings, around: Surroundings) -> Judge:
    request = {name: value for name in ("temperature", "max_tokens") if (value := getattr(settings, name)) is not None}
    limits = (settings.parallel, settings.timeout_s, settings.retries, settings.wait_s, settings.max_failures)
    patience = Patience(*limits, around.key)
    is_rating = isinstance(settings, RatingSettings)
    rates = {"comparisons": settings.comparisons, "tie": settings.tie} if is_rating else {}
    prompt = JudgePrompt(settings.prompt, around.key)
    place = (around.data_dir, around.stop)
    return EndpointJudge(server_of(), prompt, request, patience, *place, **rates, salt=str(around.seed))


def _fingerprint(settings: JudgeSettings, key: str) -> str:
    """The name of a reward model's weights; `UserError` names the setting."""
    from laddpo.errors import UserError
    from laddpo.models.loading import weights_fingerprint

    try:
        return weights_fingerprint(settings.model, settings.revision)
    except UserError as error:
        raise UserError(f"{key}.model is {settings.model!r}: {error}") from error


OPENERS: dict[str, Callable[[JudgeSettings, Surroundings], Judge]] = {
    "rule": _rule,
    "reward_model": _reward_model,
    "endpoint": _endpoint,
}
