"""Signs that training goes wrong, each said once while it happens: the loss, the gradient, the chosen answers, and a
collapse, in which the loss stays low and answers get worse.

Where held-out chosen answers become less likely after they had become more likely, training undoes what it had won. Of
the 36 runs that tuned six losses for `study=objectives` (three rates, two betas), eight turned so by TURN, and each
ended below the run of the same loss and beta at the next lower rate (data/measurements/README.md). It costs nothing: no
answer has to be written for it.
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
TURN = 0.1  # rise of validation/chosen_fall above the lowest value before it
WORSE = 0.1  # fall of validation/exact_match below the highest before it: two standard errors of 200 problems


class Watch:
    """Looks at the rows of metrics.jsonl in their order. `beta` is that of the rewards; None of an sft."""

    def __init__(self, beta: float | None):
        self._beta = beta
        self._start: float | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._falls: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # chosen ratio, reference
        self._norms: list[float] = []
        self._lowest_fall, self._best_match = (0, float("inf")), (0, 0.0)  # (step, value) of validation
        self._said: set[str] = set()

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """What this row is the first to show: one line for each sign, with what to do."""
        signs = {"turn": self._turn(row), "worse": self._worse(row)}
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
            f"the log-likelihood of the chosen answers is {fall:.0%} lower than the reference's. Raise dpo.beta, set "
            "dpo.sft_weight=0.1, or end such runs by stopping.max_chosen_fall=0.2."
        )

    def _turn(self, row: Mapping[str, Any]) -> str | None:
        fall = row.get("validation/chosen_fall")
        if fall is None:
            return None
        step, lowest = self._lowest_fall = min(self._lowest_fall, (row["step"], fall), key=lambda found: found[1])
        if fall - lowest <= TURN:
            return None
        return (
            f"held-out chosen answers have become less likely again: validation/chosen_fall is {fall:+.2f} and was "
            f"{lowest:+.2f} at step {step}. From such a turn answers get worse while the loss stays low. Lower "
            "optim.learning_rate, or take fewer steps."
        )

    def _worse(self, row: Mapping[str, Any]) -> str | None:
        match = row.get("validation/exact_match")
        if match is None:
            return None
        step, best = self._best_match = max(self._best_match, (row["step"], match), key=lambda found: found[1])
        if match > best - WORSE:
            return None
        return (
            f"answers to validation problems got worse: exact match is {match:.1%} and was {best:.1%} at step {step}. "
            "Lower optim.learning_rate or raise dpo.beta; stopping.patience ends such runs."
        )
