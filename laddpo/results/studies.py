"""A study read back: arms (one changed factor each, over several seeds) go in, a table, claims and a picture come out.

What is compared is exact match on test problems, paired by problem. Intervals count how much runs of other seeds and
other problems would differ. Seeds are also shown one by one. Choices belong to the validation column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.errors import UserError
from laddpo.results.figures import DARK, PALE, RULE, drawn, new_figure, save_png, tidy
from laddpo.results.stats import DRIFT, Difference, difference_over_seeds, mean_with_error, paired_shares
from laddpo.results.sweeps import number_text
from laddpo.results.tables import markdown, points_text
from laddpo.storage import atomic, json_lines, manifests
from laddpo.storage.run_outputs import round_folders
from laddpo.storage.seals import CheckedLines, sealed_file

BASE = "base"  # the model before training, as what an arm is compared with
EXACT_MATCH = "validation/exact_match"
SEEDS = 3  # from which intervals count them: Student's t of fewer is too wide to say anything


@dataclass(frozen=True)
class Outcome:
    """One run: right or wrong by test problem, before and after, and numbers about it (absent: not measured)."""

    seed: int
    base: Mapping[str, bool]
    tuned: Mapping[str, bool]
    facts: Mapping[str, float]


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
    return Outcome(seed, base, tuned, _facts(first, last)) if base.keys() == tuned.keys() and base else None


def right_by_item(run: Path, model: str) -> dict[str, bool]:
    """Which test problems a run's evaluation found right for `model` (base or tuned), by task and problem."""
    records = CheckedLines(sealed_file(run, "evaluation/items.jsonl")).read()
    graded = [r for r in records if r["model"] == model and r["correct"] is not None]
    return {f"{r['task']}/{r['id']}": bool(r["correct"]) for r in graded}


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
    single = [Arm(arm.name, arm.factor, arm.stage, arm.overrides, arm.against, [outcome]) for outcome in arm.outcomes]
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
            }
        )
    return {
        "arms": rows,
        "missing": [arm.name for arm in arms if not arm.outcomes],
        "claims": [
            {"arm": c.arm, "against": c.against, "margin": c.margin, "text": claim_text(c, by_name)} for c in claims
        ],
    }


def claim_text(claim: Claim, by_name: Mapping[str, Arm]) -> str:
    """The claim decided in one sentence, plainly where the interval leaves it open."""
    arm, other = by_name[claim.arm], by_name.get(claim.against)
    found = difference(arm, None if claim.against == BASE else other)
    if found is None:
        return f"{claim.arm} against {claim.against}: not measured yet."
    seeds = seed_differences(arm, None if claim.against == BASE else other)
    above = sum(seed.low > 0 for seed in seeds)
    shown = ", ".join(f"{100 * seed.difference:+.1f}" for seed in seeds)
    total = points_text(found.difference, found.low, found.high)
    numbers = f"{total} points; seeds {shown}, above 0 by itself in {above} of {len(seeds)}"
    if claim.margin is None:
        words = "better" if found.low > 0 else "worse" if found.high < 0 else "not decided: the interval includes 0"
    else:
        limit = f"{claim.margin:g} points"
        words = (
            f"not worse by {limit} or more" if 100 * found.low > -claim.margin else f"not shown to be within {limit}"
        )
    return f"{claim.arm} against {claim.against}: {numbers}: {words}."


def study_markdown(content: Mapping[str, Any], title: str, command: str) -> str:
    """The page."""
    blocks = [f"# {title}", f"`{command}`", INTRODUCTION]
    if content["missing"]:
        blocks.append(f"Not finished: {', '.join(content['missing'])}.")
    if content.get("unfinished"):
        runs_of_it = ", ".join(f"{run['run']} ({run['state']})" for run in content["unfinished"])
        blocks.append(f"Runs that are in no number below: {runs_of_it}.")
    blocks += ["## What it decides", "\n".join(f"- {claim['text']}" for claim in content["claims"])]
    by_factor: dict[str, list] = {}
    for row in content["arms"]:
        by_factor.setdefault(row["factor"], []).append(row)
    default = next((row for row in content["arms"] if row["arm"] == row["against"]), None)
    for factor, rows in by_factor.items():
        shown = rows if default is None or default in rows else [default, *rows]
        blocks += [f"## {factor}", markdown(HEADER, [_cells(row) for row in shown])]
    drifted = [line for row in content["arms"] for line in _drift_lines(row)]
    blocks += ["## Length and ends of answers", "\n".join(drifted) or f"No arm moved either by more than {DRIFT:.0%}."]
    settings = [[row["arm"], row["stage"], " ".join(row["overrides"]) or "-"] for row in content["arms"]]
    blocks += ["## Arms", markdown(["arm", "stage", "settings"], settings), "![differences](study.png)"]
    return "\n\n".join(blocks) + "\n"


@drawn
def study_plot(content: Mapping[str, Any], path: Path, title: str) -> None:
    """Exact match over the model before training, with its interval, and a point for every seed; by factor."""
    rows = content["arms"]
    figure = new_figure(8.0, max(2.6, 0.33 * len(rows) + 1.4), title)
    axes = figure.subplots()
    tidy(axes, "exact match over the model before training, points (95% interval over seeds and problems)")
    for place, row in enumerate(rows):
        found = row["against_base"]
        axes.hlines(place, *(100 * bound for bound in found["interval"]), color=PALE, linewidth=6)
        axes.plot([100 * value for value in found["by_seed"]], [place] * len(found["by_seed"]), "|", color=RULE)
        axes.plot(100 * found["difference"], place, "o", color=DARK)
    axes.axvline(0, color=RULE, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.7)
    save_png(figure, path)


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


def _cells(row: Mapping[str, Any]) -> list[str]:
    facts, base, against = row["facts"], row["against_base"], row["difference"]
    spread = mean_with_error(row["exact_match_by_seed"]).std_error
    own = f"{row['exact_match']:.1%}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")

    def fact(name: str, percent: bool = False) -> str:
        value = facts.get(name)
        return "-" if value is None else f"{value:.1%}" if percent else number_text(value)

    difference_text = "-"
    if against is not None:
        name = f" ({row['against']})" if row["against"] else ""
        difference_text = points_text(against["difference"], *against["interval"]) + name
    tokens = f"{fact('answer_tokens_base')} → {fact('answer_tokens_tuned')}"
    return [
        row["arm"],
        str(len(row["seeds"])),
        own,
        points_text(base["difference"], *base["interval"]),
        difference_text,
        _reading(against),
        f"{fact('validation_kept', True)} / {fact('validation_last', True)}",
        fact("reward_accuracy", True),
        fact("score_variance"),
        fact("chosen_fall", True),
        tokens,
        fact("ended_rate_tuned", True),
    ]


def _reading(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def _drift_lines(row: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, words in (("answer_tokens", "tokens of an answer"), ("ended_rate", "share of answers that end")):
        before, after = (row["facts"].get(f"{name}_{side}") for side in ("base", "tuned"))
        if before and after is not None and abs(after - before) > DRIFT * before:
            lines.append(f"- {row['arm']}: {words} {before:.3g} → {after:.3g}")
    return lines


INTRODUCTION = """\
One factor at a time is changed around the default arm. Exact match is on test problems that neither training nor the
choice of a checkpoint has seen. Differences are paired by problem and averaged over the seeds that both arms have.
Their 95% intervals count seeds and problems (Student's t over seeds; below three seeds, problems alone). They are not
corrected for the number of arms. ± is the standard error over seeds. "kept / last" is validation exact match of the
checkpoint that was kept and of the last step: a large gap means that training on destroys what it had won. "chosen
fall" is by how much of its start the log-likelihood of held-out chosen answers fell at the kept step; negative: it
rose. "score variance" is the mean over the training steps. With several rounds these two, and reward accuracy, are the
last round's.
An arm whose interval includes 0 is not said to help."""
HEADER = (
    "arm",
    "seeds",
    "exact match",
    "over the base",
    "difference",
    "reading",
    "validation kept / last",
    "reward accuracy",
    "score variance",
    "chosen fall",
    "tokens",
    "ended",
)
