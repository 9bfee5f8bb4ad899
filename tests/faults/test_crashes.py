"""Every writing call of prepare, precompute and train as the last one before a crash; continued, killed, continued."""

from __future__ import annotations

import random

import pytest

from tests.faults.bench import STAGES, Bench, Tally, differences, snapshot
from tests.faults.crash_points import CAN_BE_HALF, NEEDS_SPACE

SUBSET = 6  # points of each stage in the ordinary test run


def points(bench: Bench, stage: str, when: str) -> list[int]:
    """The calls at which this can happen."""
    kinds = {"half": CAN_BE_HALF, "full": NEEDS_SPACE}.get(when)
    return [number for number, (name, _) in enumerate(bench.calls[stage]) if kinds is None or name in kinds]


def chosen_points(bench: Bench, stage: str, when: str, share: float) -> tuple[list[int], str]:
    """`share` of them (--faults-share), chosen at random; of train's half of that where the other tests leave little
    new: after a call is before the next."""
    calls = points(bench, stage, when)
    if stage == "train" and when not in ("before", "half"):
        share /= 2
    if share >= 1:
        return calls, f"all {len(calls)} calls"
    some = sorted(random.Random(f"{stage} {when}").sample(calls, max(1, round(share * len(calls)))))
    return some, f"{len(some)} of the {len(calls)} calls, at random"


@pytest.fixture
def share(request) -> float:
    return request.config.getoption("--faults-share")


def crash_and_continue(bench: Bench, stage: str, call: int, when: str, tally: Tally) -> None:
    """Die at a call, go on and die at another, go on to the end; what is there then must be as if nothing had been."""
    draw = random.Random(f"{stage} {call} {when}")
    folder = bench.start(stage)
    where = f"{stage}, {when} call {call} ({' '.join(bench.calls[stage][call])})"
    again = {"call": draw.randrange(max(8, len(bench.calls[stage]) - call)), "when": draw.choice(["before", "after"])}
    for plan in ({"call": call, "when": when}, again, None, None):
        outcome = bench.run(stage, folder, plan=plan)
        tally.faults += outcome.was_killed
        if outcome.status == 0:
            break
        if not outcome.was_killed:
            tally.silent.append(f"{where}: then exit code {outcome.status}: {outcome.log[-1500:]}")
            break
    else:
        tally.silent.append(f"{where}: not finished after four runs")
    tally.runs += 1
    tally.differences += [f"{where}: {line}" for line in differences(snapshot(folder), bench.after[stage])]
    bench.remove(folder)


def fill_and_continue(bench: Bench, stage: str, call: int, tally: Tally) -> None:
    """The disk is full from a call on: said without a traceback; with space again the same command finishes equal."""
    folder = bench.start(stage)
    where = f"{stage}, full from call {call} ({' '.join(bench.calls[stage][call])})"
    outcome = bench.run(stage, folder, plan={"call": call, "when": "full"})
    tally.faults += 1
    if outcome.status != 0 and not (
        outcome.status == 2 and "No space left" in outcome.log and "Traceback" not in outcome.log
    ):
        tally.silent.append(f"{where}: exit code {outcome.status}: {outcome.log[-1500:]}")
    tally.silent += [f"{where}: left {path.name}" for path in folder.rglob(".tmp-*")]
    bench.finish(stage, folder, where, tally)


@pytest.mark.faults
@pytest.mark.parametrize("when", ["before", "half", "after", "power"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_at_any_call_and_another_after_it_change_no_byte(bench, tally, share, stage, when):
    calls, note = chosen_points(bench, stage, when, share)
    line = tally(f"killed {when} a call" if when != "power" else "power cut before a call", stage, note)
    for call in calls:
        crash_and_continue(bench, stage, call, when, line)


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_at_any_call_is_said_and_costs_nothing(bench, tally, share, stage):
    calls, note = chosen_points(bench, stage, "full", share)
    line = tally("disk full from a call on", stage, note + " that need space")
    for call in calls:
        fill_and_continue(bench, stage, call, line)


@pytest.mark.parametrize("stage", STAGES)
def test_crashes_and_full_disks_at_some_calls_change_no_byte(bench, tally, stage):
    """The part of the two tests above that every test run does."""
    line = tally("some crashes and full disks", stage, "in the ordinary test run")
    chosen = [
        (call, when) for when in ("before", "half", "after", "power", "full") for call in points(bench, stage, when)
    ]
    for call, when in random.Random(1).sample(chosen, SUBSET):
        if when == "full":
            fill_and_continue(bench, stage, call, line)
        else:
            crash_and_continue(bench, stage, call, when, line)
