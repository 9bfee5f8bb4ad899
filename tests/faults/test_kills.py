"""kill -9 and polite signals at random moments: nothing is lost but the step under way, and the end is the same."""

from __future__ import annotations

import random

import pytest

from laddpo.errors import EXIT_DONE, EXIT_STOPPED
from tests.faults.bench import STAGES, Bench, differences, snapshot, with_stores_as_values

KILLS = 300
ROUNDS = 12  # of each kind of signal in each stage
SIGNALS = {"SIGTERM": ["SIGTERM"], "SIGINT": ["SIGINT"], "SIGTERM twice": ["SIGTERM", "SIGTERM"]}


@pytest.mark.faults
def test_three_hundred_kills_in_chains_of_one_to_six_change_no_byte(bench, tally):
    """Most of them in a `train` that finds nothing done, so that it prepares and precomputes too."""
    draw = random.Random(6)
    line = tally("kill -9 at random moments, chains of 1 to 6", "all")
    while line.faults < KILLS:
        stage = draw.choice(["prepare", "precompute", "train", "train", "all"])
        folder = bench.new_folder() if stage == "all" else bench.start(stage)
        command = "train" if stage == "all" else stage
        for _ in range(draw.randint(1, 6)):
            seconds = draw.uniform(0.1, 1.0) * bench.seconds[command]
            outcome = bench.run(command, folder, signals=[[seconds, "SIGKILL"]])
            line.faults += outcome.was_killed
            if not outcome.was_killed and outcome.status != EXIT_DONE:
                line.silent.append(f"{stage}: exit code {outcome.status} after a kill: {outcome.log[-1500:]}")
        bench.finish(command, folder, f"{stage}, killed", line)


@pytest.mark.faults
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_a_random_moment_of_any_stage_loses_at_most_a_step(bench, tally, stage, name):
    signals_at_random(bench, tally, stage, name, ROUNDS)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_at_some_moments_of_training_loses_at_most_a_step(bench, tally, name):
    signals_at_random(bench, tally, "train", name, 2)


def signals_at_random(bench: Bench, tally, stage: str, name: str, rounds: int) -> None:
    """A single signal is answered with a checkpoint, so no step is lost even where none is due (save_steps=1000)."""
    draw = random.Random(f"{stage} {name}")
    is_single = len(SIGNALS[name]) == 1
    overrides = ["save_steps=1000"] if stage == "train" and is_single else []
    wanted = without_early_checkpoints(bench.undisturbed(stage, overrides))
    line = tally(f"{name} at a random moment", stage, f"at most {0 if is_single else 1} steps lost")
    while line.runs < rounds or (not line.faults and line.runs < 5 * rounds):  # one after the end shows nothing
        folder = bench.start(stage)
        first = draw.uniform(0.05, 1.0) * bench.seconds[stage]
        at = [[first + draw.uniform(0, 0.1) * number, signal] for number, signal in enumerate(SIGNALS[name])]
        outcome = bench.run(stage, folder, overrides=overrides, signals=at)
        line.faults += outcome.status != EXIT_DONE
        if outcome.status == EXIT_DONE:  # the machine is faster now
            bench.seconds[stage] = min(bench.seconds[stage], outcome.seconds)
        if outcome.status not in (EXIT_DONE, EXIT_STOPPED) or "Traceback" in outcome.log:
            line.silent.append(f"{stage}, {name}: exit code {outcome.status}: {outcome.log[-1500:]}")
        lost = lost_steps(folder)
        if lost > (0 if is_single else 1):
            line.silent.append(f"{stage}, {name}: {lost} steps lost")
        again = bench.run(stage, folder, overrides=overrides)
        line.silent += [] if again.status == EXIT_DONE else [f"not continued: {again.log[-1500:]}"]
        found = with_stores_as_values(without_early_checkpoints(snapshot(folder)))
        line.runs += 1
        line.differences += [f"{stage}, {name}: {file}" for file in differences(found, with_stores_as_values(wanted))]
        bench.remove(folder)


def lost_steps(folder) -> int:
    """Steps that were logged and are in no checkpoint."""
    run = folder / "run"
    log = run / "metrics.jsonl"
    logged = [line for line in log.read_bytes().split(b"\n") if b'"loss"' in line] if log.exists() else []
    saved = [int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")]
    return len(logged) - max(saved, default=0)


def without_early_checkpoints(found: dict) -> dict:
    """A stopped run keeps one more checkpoint than another; the last one must be the same."""
    last = max((name.split("/")[2] for name in found if name.startswith("run/checkpoints/step_")), default="")
    return {name: value for name, value in found.items() if "/checkpoints/" not in name or f"/{last}/" in name}
