"""The typed settings of a judge; part of laddpo/settings/schema.py, where two groups have one."""

from __future__ import annotations

from dataclasses import dataclass

from laddpo.judging.judges import JUDGES, RULES


@dataclass
class JudgeSettings:
    """evaluation.judge: who says which of two answers is better. Each kind reads its part of these."""

    kind: str = "none"
    tie: float = 0.0
    rule: str = "right"
    pattern: str | None = None
    model: str | None = None
    revision: str | None = None
    label: str | None = None
    device: str = "auto"
    batch_size: int = 16
    max_length: int = 2048
    prompt: str | None = None
    temperature: float | None = 0.0
    max_tokens: int | None = 1024
    parallel: int = 4
    timeout_s: float = 60.0
    retries: int = 5
    wait_s: float = 1.0
    max_failures: int = 20


@dataclass
class RatingSettings(JudgeSettings):
    """data.judge: the same for several answers to one prompt."""

    comparisons: int = 8


def fields_read(settings: JudgeSettings, is_rating: bool) -> set[str]:
    """Which of these settings are read beside `kind`. `is_rating`: several answers to one prompt are rated."""
    if settings.kind not in JUDGES:
        return set()
    kind = JUDGES[settings.kind]
    found = {*kind.reads, *(kind.rates if is_rating else ())}
    rule = RULES.get(settings.rule)
    if settings.kind == "rule" and rule is not None and not rule.needs_pattern:
        found.remove("pattern")
    return found


def needs_gold(settings: JudgeSettings) -> bool:
    """Whether the judge asks for right answers."""
    return settings.kind == "rule" and settings.rule in RULES and RULES[settings.rule].needs_gold
