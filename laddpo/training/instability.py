"""Signs that training goes wrong, each said once while it happens: the loss, the gradient, the chosen answers, and a
collapse, in which the loss of training stays low and answers get worse.

What marked collapses in runs that were made to look at it, and what did not, is in data/measurements/README.md. The
loss of held-out rows costs no answer; it marks some collapses and not all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

WINDOW = 10  # logged steps that are looked at together
LOSS_RISE = 1.1  # mean loss of a window over that of the first step
NORM_RISE = 10.0  # gradient norm over the median of those before
CHOSEN_FALL = 0.1  # of the reference's log-likelihood of the chosen answers
UP, FELL = 0.2, 0.05  # rise of validation/loss over its fall, once it has fallen by so much of its start
WORSE = 0.1  # fall of validation/exact_match below the highest before it: two standard errors of 200 problems


class Watch:
    """Looks at the rows of metrics.jsonl in their order. `beta` is that of the rewards; None of an sft."""

    def __init__(self, beta: float | None):
        self._beta = beta
        self._start: float | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._falls: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # chosen ratio, reference
        self._norms: list[float] = []
        self._held_out: list[tuple[float, int]] = []  # validation/loss, step
        self._best_match = (0.0, 0)  # validation/exact_match, step
        self._said: set[str] = set()

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """What this row is the first to show: one line for each sign, with what to do."""
        signs = {"up": self._up(row), "worse": self._worse(row)}
        if row.get("loss") is not None:
            signs |= {
                "loss": self._loss(row["loss"]),
                "norm": self._norm(row.get("grad_norm")),
                "fall": self._fall(row),
            }
        new = {sign: text for sign, text in signs.items() if text and sign not in self._said}
        self._said |= new.keys()
        return [f"note: step {row['step']}: {text}" for text in new.values()]

    def _loss(self, loss: float) -> str | None:
        self._start = loss if self._start is None else self._start
        self._losses.append(loss)
        mean = fmean(self._losses)
        if len(self._losses) < WINDOW or mean <= LOSS_RISE * self._start:
            return None
        return (
            f"the mean loss of {WINDOW} steps is {mean:.3g}, above its start of {self._start:.3g}: the steps are too "
            f"large for these rows. Lower {'dpo.beta or ' if self._beta else ''}optim.learning_rate."
        )

    def _norm(self, norm: float | None) -> str | None:
        if norm is None:
            return None
        usual = median(self._norms) if len(self._norms) >= WINDOW else None
        self._norms.append(norm)
        if usual is None or norm <= NORM_RISE * usual:
            return None
        return (
            f"the gradient norm is {norm:.3g}, and its median so far {usual:.3g}: a few rows decide this step. Lower "
            "optim.learning_rate, or look at the longest rows."
        )

    def _fall(self, row: Mapping[str, Any]) -> str | None:
        reward, logps = row.get("rewards/chosen"), row.get("logps/chosen")
        if reward is None or logps is None or not self._beta:
            return None
        ratio = reward / self._beta
        self._falls.append((ratio, logps - ratio))
        ratios, references = (fmean(values) for values in zip(*self._falls, strict=True))
        if len(self._falls) < WINDOW or not references or (fall := ratios / references) <= CHOSEN_FALL:
            return None
        return (
            f"the log-likelihood of the chosen answers is {fall:.0%} lower than the reference's. If they are right as "
            "they stand, raise dpo.beta, set dpo.sft_weight=0.1, or end such runs by stopping.max_chosen_fall=0.2. If "
            "they are only better than the rejected ones, it may be their faults that go."
        )

    def _up(self, row: Mapping[str, Any]) -> str | None:
        loss = row.get("validation/loss")
        if loss is None:
            return None
        self._held_out.append((loss, row["step"]))
        start, (lowest, step) = self._held_out[0][0], min(self._held_out)
        fell = start - lowest
        if fell <= FELL * abs(start) or loss - lowest <= UP * fell:
            return None
        return (
            f"the loss of held-out rows rises again: {loss:.3g}, and {lowest:.3g} at step {step}. Answers may get "
            "worse from here while the loss of training stays low. Lower optim.learning_rate, or take fewer steps."
        )

    def _worse(self, row: Mapping[str, Any]) -> str | None:
        match = row.get("validation/exact_match")
        if match is None:
            return None
        best, step = self._best_match = max(self._best_match, (match, row["step"]), key=lambda found: found[0])
        if match > best - WORSE:
            return None
        return (
            f"answers to validation problems got worse: exact match is {match:.1%} and was {best:.1%} at step {step}. "
            "Lower optim.learning_rate or raise dpo.beta; stopping.patience ends such runs."
        )
