"""What else a study's runs say: their answers at other temperatures, and what training mended and what it broke.

An arm may gain because it mends what was wrong, and lose because it breaks what was right: both groups are counted, for
exact match and for each mark of a task that has several. Items of the runs go in, entries of study.json and blocks of
the page come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laddpo.results.stats import mean_with_error
from laddpo.results.studies import Arm, Claim, Outcome, study_json
from laddpo.results.tables import markdown, points_text
from laddpo.storage.run_outputs import round_folders
from laddpo.storage.seals import CheckedLines, sealed_file

EXACT = "exact match"
FIRST = "Runs that come before the arms of each seed. `{name}` in the settings of an arm is the folder of a run:"
Graded = dict[str, dict[str, bool]]  # by mark, then by problem


def more_json(folder: Path, arms: Sequence[Arm], claims: Sequence[Claim]) -> dict[str, Any]:
    """`also`: by temperature, arms and claims as study_json has them. `mended`: by temperature ("": the first), arm and
    mark, how many were wrong, how many of these are right after training, and the same of those that were right."""
    by_arm = {arm.name: {o.seed: graded_answers(folder / f"{arm.name}-{o.seed}") for o in arm.outcomes} for arm in arms}
    said = list(dict.fromkeys(s for seeds in by_arm.values() for both in seeds.values() for s in both))
    also = {}
    for name in filter(None, said):
        found = {arm: [_outcome(s, both[name]) for s, both in by_arm[arm].items() if name in both] for arm in by_arm}
        also[name] = study_json([replace(arm, outcomes=found[arm.name]) for arm in arms], claims)
    return {"also": also, "mended": {name: {arm: _counts(by_arm[arm], name) for arm in by_arm} for name in said}}


def graded_answers(run: Path) -> dict[str, tuple[Graded, Graded]]:
    """By what is said behind the model's name ("" or " at temperature 1"), the marks before and after training."""
    rounds = round_folders(run)
    first, last = (rounds[0], rounds[-1]) if rounds else (run, run)
    before, after = _by_name(first, "base"), _by_name(last, "tuned")
    return {said: (before[said], after[said]) for said in after if said in before}


def _by_name(run: Path, model: str) -> dict[str, Graded]:
    found: dict[str, Graded] = {}
    for record in CheckedLines(sealed_file(run, "evaluation/items.jsonl")).read():
        name, problem = str(record["model"]), f"{record['task']}/{record['id']}"
        if not name.startswith(model) or record.get("correct") is None:
            continue
        marks = {EXACT: record["correct"], **record.get("marks", {})}
        for mark, has in marks.items():
            found.setdefault(name.removeprefix(model), {}).setdefault(mark, {})[problem] = bool(has)
    return found


def _outcome(seed: int, both: tuple[Graded, Graded]) -> Outcome:
    return Outcome(seed, both[0][EXACT], both[1][EXACT], {})


def _counts(seeds: Mapping[int, Mapping[str, tuple[Graded, Graded]]], said: str) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for both in seeds.values():
        before, after = both.get(said, ({}, {}))
        for mark in before.keys() & after.keys():
            row = counts.setdefault(mark, {"wrong": 0, "mended": 0, "right": 0, "kept": 0})
            for problem in before[mark].keys() & after[mark].keys():
                group, then = ("right", "kept") if before[mark][problem] else ("wrong", "mended")
                row[group] += 1
                row[then] += after[mark][problem]
    order = next((list(both[said][0]) for both in seeds.values() if said in both), [])
    return {mark: counts[mark] for mark in order if mark in counts}


def more_blocks(content: Mapping[str, Any]) -> list[str]:
    """The sections of the page."""
    blocks = []
    if first := [[run["name"], run["stage"], " ".join(run["overrides"]) or "-"] for run in content.get("first", ())]:
        blocks += [FIRST, markdown(["run", "stage", "settings"], first)]
    for said, found in content["also"].items():
        rows = [_row(row) for row in found["arms"]]
        header = ["arm", "seeds", "exact match", "over the base", "difference"]
        claims = "\n".join(f"- {claim['text']}" for claim in found["claims"])
        blocks += [f"## Answers{said}", markdown(header, rows), claims]
    for said, arms in content["mended"].items():
        names = list(dict.fromkeys(mark for marks in arms.values() for mark in marks))
        rows = [row for arm, marks in arms.items() if marks for row in _group_rows(arm, marks, names)]
        if rows:
            title = f"## What was wrong before and is right after, and what was right{said}"
            shown = [name.replace("_", " ") for name in names]
            blocks += [title, markdown(["arm", "before training", *shown], rows)]
    return [block for block in blocks if block]


def _row(row: Mapping[str, Any]) -> list[str]:
    base, against = row["against_base"], row["difference"]
    error = mean_with_error(row["exact_match_by_seed"]).std_error
    difference = f"{points_text(against['difference'], *against['interval'])} ({row['against']})" if against else "-"
    own = f"{row['exact_match']:.1%}" + (f" ± {100 * error:.1f}" if error == error else "")
    return [row["arm"], str(len(row["seeds"])), own, points_text(base["difference"], *base["interval"]), difference]


def _group_rows(arm: str, marks: Mapping[str, Mapping[str, int]], names: Sequence[str]) -> list[list[str]]:
    def cells(then: str, group: str) -> list[str]:
        return [f"{marks[name][then]:,} of {marks[name][group]:,}" if name in marks else "-" for name in names]

    return [[arm, "wrong, now right", *cells("mended", "wrong")], [arm, "right, still right", *cells("kept", "right")]]
