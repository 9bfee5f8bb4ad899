"""The memory of a run's steps: predicted by the plan, measured while they run, both said once.

On a GPU every step is measured, which costs nothing. On a CPU looking costs time, so that is done for one early step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from laddpo.errors import RunFault
from laddpo.hardware.machine import Machine
from laddpo.hardware.measuring import bytes_before, peak_bytes
from laddpo.hardware.memory import GIB, explain, gib
from laddpo.hardware.planning import Choice, usable
from laddpo.hardware.speed import duration
from laddpo.processes.progress import Progress

WATCHED_STEP = 1  # counted from 0 in this process: the first one that finds the optimizer's state allocated
MOST_BLOCK_PASSES = 5000  # of a step watched on the CPU: each leaves some hundred records


@dataclass
class StepMemory:
    """Wraps the loop's steps (`watch` of `train_loop`) and keeps what it learned for timing.jsonl.

    `step_tokens`: tokens of a large step under all draws, which bounds how long a step takes to watch.
    """

    machine: Machine
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step_tokens: int
    steps: int = 0
    known: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def watch(self, is_last: bool) -> Iterator[dict[str, float]]:
        """Around one step; yields the fields for its line in timing.jsonl, filled when the block ends."""
        is_first_look = self.steps == WATCHED_STEP or (is_last and not self.known)
        self.steps += 1
        if self.machine.device.type == "cpu" and not (is_first_look and self._can_look()):
            yield self.known
        else:
            self.optimizer.zero_grad(set_to_none=True)
            before = bytes_before(self.machine.device, self.model, self.optimizer)
            with peak_bytes(self.machine.device) as peak:
                yield self.known
            self._learn(before + peak.above, is_first_look)
        self.known["memory/oom_retries"] = self.machine.token_budget.retries

    def _can_look(self) -> bool:
        micro_steps = 1 + self.step_tokens // self.machine.token_budget.tokens
        return micro_steps * self.machine.choice.setup.shape.n_layers <= MOST_BLOCK_PASSES

    def _learn(self, measured: int, is_first_look: bool) -> None:
        predicted = self.machine.choice.memory.peak
        self.known["memory/peak_gib"] = max(self.known.get("memory/peak_gib", 0.0), measured / GIB)
        self.known["memory/predicted_gib"] = predicted / GIB
        if is_first_look:
            share = f"{measured / predicted:.0%}"
            Progress.write(f"memory of a step: predicted {gib(predicted)}, measured {gib(measured)} ({share})")


def retries_text(machine: Machine) -> str:
    """What a run that ran out of memory says at its end; empty where it never did."""
    budget, planned = machine.token_budget, machine.choice.token_budget
    if not budget.retries:
        return ""
    return (
        f"memory ran out {budget.retries} times; micro-steps were halved from {planned} to {budget.tokens} tokens. "
        f"Start with hardware.token_budget={budget.tokens} to save the failed attempts."
    )


def dry_run_text(tokens: float, tokens_per_s: float, has_reference: bool) -> str:
    """What two steps on the longest batch say of the whole run, whose steps take so many `tokens`."""
    without = "the reference and without evaluation" if has_reference else "evaluation"
    return (
        f"dry run: the longest batch fits. At its {tokens_per_s:,.0f} tokens/s the whole training "
        f"({tokens:,.0f} tokens under all draws) takes about {duration(tokens / tokens_per_s)}, without {without}. No "
        f"run was kept; prepared rows{' and reference values' if has_reference else ''} are."
    )


def out_of_memory_fault(choice: Choice, error: BaseException) -> RunFault:
    """For memory that ran out where no smaller pass is tried."""
    reason = str(error).partition("\n")[0]
    where = (
        "memory ran out outside of a micro-step: while loading, in the optimizer, in a greedy check of the harness, or "
        "in a reward model"
    )
    if choice.fits:
        plan = f"The plan predicts {gib(choice.memory.peak)} of {gib(choice.available)} for training"
        advice = "Close other programs on the device. A reward model may run on the CPU: evaluation.judge.device=cpu."
        return RunFault(f"{where}. {plan}. {advice} ({reason})")
    return RunFault(f"{where}. {explain(choice.memory, usable(choice.available), 'By the plan this run')} ({reason})")
