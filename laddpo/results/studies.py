"""A study read back: arms (one changed factor each, over several seeds) go in, a table, claims and a picture come out.

What is compared is exact match on test problems, paired by problem. Intervals count how much runs of other seeds and
other problems would differ. Claims are corrected for their number (Holm). Seeds are also shown one by one, and groups
of problems by themselves. Choices belong to the validation column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.errors import UserError
from laddpo.problems.groups import group_of_items
from laddpo.results.stats import Difference, difference_over_seeds, holm, paired_shares
from laddpo.results.tables import points_text
from laddpo.settings.compose import read_config
from laddpo.storage import atomic, json_lines, manifests
from laddpo.storage.run_outputs import round_folders
from laddpo.storage.seals import CheckedLines, sealed_file

BASE = "base"  # the model before training, as what an arm is compared with
EXACT_MATCH = "validation/exact_match"
SEEDS = 3  # from which intervals count them: Student's t of fewer is too wide to say anything
SURE = 0.05  # p of a claim that is decided, corrected for the number of claims


@dataclass(frozen=True)
class Outcome:
    """One run: right or wrong by test problem, before and after, and numbers about it (absent: not measured). `groups`:
    the group of each problem of a task that has some (`laddpo/problems/groups.py`)."""

    seed: int
    base: Mapping[str, bool]
    tuned: Mapping[str, bool]
    facts: Mapping[str, float]
    groups: Mapping[str, str] = field(default_factory=dict)

    def within(self, group: str) -> Outcome:
        """The same on the problems of one group alone."""
        base, tuned = (
            {name: right for name, right in of_model.items() if self.groups.get(name) == group}
            for of_model in (self.base, self.tuned)
        )
        return replace(self, base=base, tuned=tuned)


@dataclass(frozen=True)
class Arm:
    """`against` names the arm that it is compared with; `outcomes` has the seeds that are finished."""

    name: str
    factor: str
    stage: str
    overrides: Sequence[str]
    against: str
    outcomes: Sequence[Outcome] = field(default_factory=list)

    def mean(self, fact: str) -> float | None:
        """Over the seeds that have it."""
        values = [outcome.facts[fact] for outcome in self.outcomes if fact in outcome.facts]
        return sum(values) / len(values) if values else None

    @property
    def exact_match(self) -> float:
        return float(np.mean([right for outcome in self.outcomes for right in outcome.tuned.values()]))


@dataclass(frozen=True)
class Claim:
    """What the study is to decide: `arm` better than `against`, or (margin in points) not worse by more than that."""

    arm: str
    against: str
    margin: float | None = None


def read_outcome(folder: Path, seed: int) -> Outcome | None:
    """A finished run of train (one round or several) or sft; None when it is not finished."""
    if not (folder / manifests.MANIFEST).exists():
        return None
    manifests.read_manifest(folder, "train", "sft")
    rounds = round_folders(folder)
    first, last = (rounds[0], rounds[-1]) if rounds else (folder, folder)
    base, tuned = right_by_item(first, "base"), right_by_item(last, "tuned")
    if base.keys() != tuned.keys() or not base:
        return None
    return Outcome(seed, base, tuned, _facts(first, last), _groups(last))


def right_by_item(run: Path, model: str) -> dict[str, bool]:
    """Which test problems a run's evaluation found right for `model` (base or tuned), by task and problem."""
    records = CheckedLines(sealed_file(run, "evaluation/items.jsonl")).read()
    graded = [r for r in records if r["model"] == model and r["correct"] is not None]
    return {f"{r['task']}/{r['id']}": bool(r["correct"]) for r in graded}


def _groups(run: Path) -> dict[str, str]:
    """The group of each problem, by task and problem."""
    tasks = [entry["task"] for entry in _results(run).values() if isinstance(entry, dict) and "task" in entry]
    if not tasks:
        return {}
    data = read_config(run).data
    return {
        f"{task['name']}/{name}": group
        for task in tasks
        for name, group in group_of_items(task["name"], task, data.habit, data.sampling.unseen_steps).items()
    }


def difference(arm: Arm, other: Arm | None) -> Difference | None:
    """Mean of (arm - other) over problems and the seeds that both have; `other` None: the model before training.

    The interval counts seeds and problems where there are SEEDS of them, and else problems alone. It is never narrower
    than that over problems: seeds that agree by chance do not make a result certain.
    """
    runs: list[dict[str, tuple[float, float]]] = []
    theirs = {outcome.seed: outcome.tuned for outcome in (other.outcomes if other else ())}
    for outcome in arm.outcomes:
        reference = outcome.base if other is None else theirs.get(outcome.seed, {})
        common = sorted(outcome.tuned.keys() & reference.keys())
        if common:
            runs.append({problem: (float(reference[problem]), float(outcome.tuned[problem])) for problem in common})
    if not runs:
        return None
    groups = [problem for run in runs for problem in run]
    before, after = zip(*[values for run in runs for values in run.values()], strict=True)
    over_problems = paired_shares(before, after, np.random.default_rng(0), groups=groups)
    if len(runs) < SEEDS:
        return over_problems
    changes = [{name: later - earlier for name, (earlier, later) in run.items()} for run in runs]
    return max(over_problems, difference_over_seeds(changes), key=lambda found: found.high - found.low)


def seed_differences(arm: Arm, other: Arm | None) -> list[Difference]:
    """The difference in every seed by itself."""
    single = [replace(arm, outcomes=[outcome]) for outcome in arm.outcomes]
    return [found for one in single if (found := difference(one, other)) is not None]


def study_json(arms: Sequence[Arm], claims: Sequence[Claim]) -> dict[str, Any]:
    """Everything the page says, as data."""
    by_name = {arm.name: arm for arm in arms}
    rows = []
    for arm in arms:
        if not arm.outcomes:
            continue
        reference = by_name.get(arm.against) if arm.against != arm.name else None
        facts = sorted({name for outcome in arm.outcomes for name in outcome.facts})
        rows.append(
            {
                "arm": arm.name,
                "factor": arm.factor,
                "stage": arm.stage,
                "overrides": list(arm.overrides),
                "seeds": [outcome.seed for outcome in arm.outcomes],
                "exact_match": arm.exact_match,
                "exact_match_by_seed": [float(np.mean(list(o.tuned.values()))) for o in arm.outcomes],
                "against_base": _compared(arm, None),
                "against": arm.against,
                "difference": _compared(arm, reference) if reference else None,
                "facts": {name: arm.mean(name) for name in facts},
                "groups": _by_group(arm),
            }
        )
    return {
        "arms": rows,
        "missing": [arm.name for arm in arms if not arm.outcomes],
        "claims": decided(claims, by_name),
    }


def _by_group(arm: Arm) -> dict[str, Any]:
    """For each group of problems: how many, how many were right before and after, all seeds together, the change."""
    found = {}
    for group in sorted({group for outcome in arm.outcomes for group in outcome.groups.values()}):
        inside = replace(arm, outcomes=[outcome.within(group) for outcome in arm.outcomes])
        if (change := _compared(inside, None)) is not None:
            before, after = (
                sum(sum(getattr(outcome, model).values()) for outcome in inside.outcomes) for model in ("base", "tuned")
            )
            found[group] = {"base": before, "tuned": after, **change}
    return found


def decided(claims: Sequence[Claim], by_name: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Each claim with its sentence, p, and p corrected for the number of claims that were measured (Holm)."""
    found = [difference(by_name[c.arm], None if c.against == BASE else by_name.get(c.against)) for c in claims]
    measured = [i for i, one in enumerate(found) if one is not None]
    p_values = [_p_value(found[i], claims[i].margin) for i in measured]
    corrected = dict(zip(measured, zip(p_values, holm(p_values), strict=True), strict=True))
    rows = []
    for i, (claim, one) in enumerate(zip(claims, found, strict=True)):
        row = {"arm": claim.arm, "against": claim.against, "margin": claim.margin}
        p, holm_p = corrected.get(i, (None, None))
        text = f"{claim.arm} against {claim.against}: not measured yet."
        if one is not None:
            text = claim_text(claim, by_name, one, p, holm_p)
        rows.append({**row, "p": p, "p_holm": holm_p, "text": text})
    return rows


def _p_value(found: Difference, margin: float | None) -> float:
    """Of the two-sided test that there is no difference, or of the one that the arm is worse by the margin or more."""
    if margin is not None:
        return found.p_above(-margin / 100)
    above = found.p_above()
    return 2 * min(above, 1 - above)


def claim_text(claim: Claim, by_name: Mapping[str, Arm], found: Difference, p: float, corrected: float) -> str:
    """The claim decided in one sentence, plainly where the interval or the number of claims leaves it open."""
    arm, other = by_name[claim.arm], None if claim.against == BASE else by_name.get(claim.against)
    seeds = seed_differences(arm, other)
    above = sum(seed.low > 0 for seed in seeds)
    shown = ", ".join(f"{100 * seed.difference:+.1f}" for seed in seeds)
    total = points_text(found.difference, found.low, found.high)
    numbers = f"{total} points; seeds {shown}, above 0 by itself in {above} of {len(seeds)}"
    words = "better" if found.difference > 0 else "worse"
    if claim.margin is not None:
        words = f"not worse by {claim.margin:g} points or more"
    if corrected < SURE:
        said = f"{words} (p = {p:.2g}, {corrected:.2g} corrected)"
    elif p < SURE:
        said = f"{words} by itself (p = {p:.2g}), not decided among so many claims ({corrected:.2g} corrected)"
    else:
        said = f"not decided (p = {p:.2g})"
    return f"{claim.arm} against {claim.against}: {numbers}: {said}."


def _compared(arm: Arm, other: Arm | None) -> dict[str, Any] | None:
    found = difference(arm, other)
    if found is None:
        return None
    return {
        "difference": found.difference,
        "interval": [found.low, found.high],
        "items": found.items,
        "by_seed": [seed.difference for seed in seed_differences(arm, other)],
    }


def _facts(first: Path, last: Path) -> dict[str, float]:
    """Numbers about a run; of several rounds lengths are those of the first's start and the last's end."""
    rows = json_lines.JsonLines(sealed_file(last, "metrics.jsonl")).read()
    manifest = manifests.read_manifest(last, "train", "sft")
    if manifest is None:
        raise UserError(
            f"{last}: has no {manifests.MANIFEST}, expected a finished round; continue it with resume={last.parent}."
        )
    fields = manifest["fields"]
    found: dict[str, float] = {"step_kept": fields.get("best_step") or 0, "steps": fields.get("step") or 0}
    answered = [row for row in rows if EXACT_MATCH in row]
    if answered:
        found["validation_last"] = answered[-1][EXACT_MATCH]
        at_kept = [row[EXACT_MATCH] for row in answered if row["step"] == found["step_kept"]]
        if at_kept:  # not the best of another step, which is no checkpoint
            found["validation_kept"] = at_kept[-1]
    kept = next((row for row in rows if row["step"] == found["step_kept"] and "validation/chosen_fall" in row), None)
    if kept is not None:
        found["chosen_fall"] = kept["validation/chosen_fall"]
    variances = [row["score/variance"] for row in rows if "score/variance" in row and row["step"] > 1]
    if variances:
        found["score_variance"] = sum(variances) / len(variances)
    before, after = (_results(place) for place in (first, last))
    for name in ("answer_tokens", "ended_rate"):
        if name in before and name in after:
            found[f"{name}_base"], found[f"{name}_tuned"] = before[name]["base"], after[name]["tuned"]
    if "reward_accuracy" in after:
        found["reward_accuracy"] = after["reward_accuracy"]["tuned"]
    times = [row for place in {first, last} for row in json_lines.JsonLines(place / "timing.jsonl").read()]
    found["minutes"] = sum(row.get("seconds", 0) + row.get("evaluation_seconds", 0) for row in times) / 60
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _results(run: Path) -> dict[str, Any]:
    path = sealed_file(run, "evaluation/results.json")
    return atomic.read_json(path) if path.exists() else {}
