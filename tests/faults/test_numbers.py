"""A loss or gradient that is not finite, memory that runs out: at any step the run stops before harm, and goes on."""

from __future__ import annotations

import json

import pytest

from tests.faults.bench import differences, snapshot
from tests.faults.parent import STEPS

WORDS = {
    "loss": ("the loss is nan", "Rows: ", "optim.skip_nonfinite"),
    "gradient": ("the gradient norm ", "Rows: ", "optim.skip_nonfinite"),
    "memory": ("memory ran out", "The plan predicts"),
}


def fault_and_continue(bench, tally, kind: str, steps) -> None:
    line = tally({"memory": "out of memory in a step"}.get(kind, f"{kind} not finite in a step"), "train")
    for step in steps:
        folder = bench.start("train")
        outcome = bench.run("train", folder, numbers={"kind": kind, "calls": [step]})
        line.faults += 1
        missing = [words for words in WORDS[kind] if words not in outcome.log]
        if outcome.status != 1 or missing or "Traceback" in outcome.log:
            line.silent.append(
                f"{kind}, step {step + 1}: exit code {outcome.status}, no {missing}: {outcome.log[-1500:]}"
            )
        if kind != "memory":
            check_report(folder / "run" / "fault", step, line)
        again = bench.run("train", folder)
        if again.status != 0:
            line.silent.append(f"{kind}, step {step + 1}: not continued: {again.log[-1500:]}")
        found = {name: data for name, data in snapshot(folder).items() if not name.startswith("run/fault/")}
        line.runs += 1
        line.differences += [f"{kind}, step {step + 1}: {name}" for name in differences(found, bench.after["train"])]
        bench.remove(folder)


def check_report(folder, step: int, line) -> None:
    """What a bug report needs: the step, its rows, the seed, and the weights as they were before it."""
    from safetensors.torch import load_file

    if not (folder / "fault.json").exists():
        line.silent.append(f"step {step + 1}: no report in {folder.name}/")
        return
    facts = json.loads((folder / "fault.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    assert facts["step"] == step + 1 and len(facts["rows"]) == 2 and facts["nonfinite_weights"] == []
    assert weights and all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.faults
@pytest.mark.parametrize("kind", WORDS)
def test_a_fault_of_numbers_or_memory_in_any_step_costs_that_step(bench, tally, kind):
    fault_and_continue(bench, tally, kind, range(STEPS))


@pytest.mark.parametrize("kind", WORDS)
def test_a_fault_of_numbers_or_memory_in_one_step_costs_that_step(bench, tally, kind):
    fault_and_continue(bench, tally, kind, [1])
