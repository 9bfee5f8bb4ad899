"""What each setting of a judge may be; part of the tables of laddpo/settings/ranges.py."""

from __future__ import annotations

from collections.abc import Collection

from laddpo.judging.judges import JUDGES, RULES
from laddpo.preference.judged import PAIRINGS
from laddpo.settings.bounds import Range, at_least, more_than

JUDGE_GROUPS = ("evaluation.judge", "data.judge")
JUDGE_CHOICES: dict[str, Collection[str]] = {
    **{f"{group}.kind": ("none", *JUDGES) for group in JUDGE_GROUPS},
    **{f"{group}.rule": RULES for group in JUDGE_GROUPS},
    "data.pair_by": PAIRINGS,
}
JUDGE_RANGES: dict[str, Range] = {
    **{
        f"{group}.{name}": bounds
        for group in JUDGE_GROUPS
        for name, bounds in {
            "tie": at_least(0, "0 makes only equal scores a tie"),
            "batch_size": at_least(1, "16 is usual"),
            "max_length": at_least(1, "2048 is usual"),
            "temperature": at_least(0, "0 is usual, null leaves it to the endpoint"),
            "max_tokens": at_least(1, "1024 is usual, null leaves it to the endpoint"),
            "parallel": at_least(1, "4 is usual", 256),
            "timeout_s": more_than(0, "60 is usual"),
            "retries": at_least(0, "5 is usual"),
            "wait_s": at_least(0, "1 is usual"),
            "max_failures": at_least(0, "20 is usual, 0 stops at the first"),
        }.items()
    },
    "data.judge.comparisons": at_least(1, "as many as data.sampling.samples is usual"),
}
