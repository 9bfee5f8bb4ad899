"""The noise of an optimizer step's gradient: how much of it masks bring, how much pairs, and what that says about n.

A step takes the mean gradient of B pairs, each under n draws. With g = mean + (what the pair differs by) + (what its
masks add), the trace of its covariance is

    noise = (between + within_n) / B

`within`: mean over pairs of the trace over evaluations. `between`: trace over pairs, without the part that is masks.
The signal is the squared length of the mean gradient, estimated from products of different pairs, whose noise is
independent: nothing has to be taken off it. Pairs count as drawn from a set much larger than a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laddpo.estimator_study.intervals import Intervals, Quantity, Sample
from laddpo.estimator_study.noise import Measured

Found = dict[str, Any]  # {"value": float or None, "interval": [low, high] or None}


@dataclass(frozen=True)
class Step:
    """The run's own step: draws of a response, pairs, and training pairs that there are."""

    draws: int
    pairs: int
    training_pairs: int

    def pairs_at(self, draws: int) -> int | None:
        """Pairs of a step with so many draws and as many forwards; None if there is no such step."""
        pairs, rest = divmod(self.pairs * self.draws, draws)
        return None if rest or not pairs or pairs > max(self.pairs, self.training_pairs) else pairs


def total(sample: Sample, m: Measured) -> Quantity:
    """Trace of the covariance of one pair's gradient, over pairs and masks."""
    return sample.mean(m.gradient_length) - signal(sample, m)


def signal(sample: Sample, m: Measured) -> Quantity:
    """Squared length of the mean gradient."""
    return sample.mean_product(m.gradient_products)


def noise_table(own: Mapping[int, Measured], step: Step, intervals: Intervals) -> list[Found]:
    """A row for every number of draws at which the run's own estimator was measured, the run's own among them.

    `relative` and `relative_over_signal` compare with the run's own at equal forwards. `relative_corrected` is the
    interval of the first for all comparisons together (Bonferroni).
    """
    base = own[step.draws]
    compared = sum(step.pairs_at(n) is not None for n in own if n != step.draws)
    return [_row(m, base, step, intervals, 1 - 0.05 / max(1, compared)) for _, m in sorted(own.items())]


def _row(m: Measured, base: Measured, step: Step, intervals: Intervals, confidence: float) -> Found:
    def found(statistic: Callable[[Sample], Quantity], *scales: str) -> Found:
        """With the interval of the first scale on which there is one."""
        for scale in scales or ("log",):
            value, interval = intervals.of(statistic, scale)
            if interval is not None:
                break
        return {"value": value, "interval": interval}

    pairs = step.pairs_at(m.draws)
    row: Found = {
        "draws": m.draws,
        "pairs_per_step": pairs,
        "within": found(lambda s: s.mean(m.gradient)),
        "between": found(lambda s: total(s, m) - s.mean(m.gradient), "log", "plain"),
        "mask_share": found(lambda s: s.mean(m.gradient) / total(s, m), "logit"),
        "signal": found(lambda s: signal(s, m), "plain"),
    }
    if pairs is None:
        return row
    row["noise"] = found(lambda s: total(s, m) * (1 / pairs))
    row["noise_over_signal"] = _inverse(found(lambda s: signal(s, m) / (total(s, m) * (1 / pairs)), "plain"))
    if m.draws != base.draws:
        ratio = functools.partial(_ratio, m=m, base=base, times=step.pairs / pairs)
        row["relative"] = found(ratio)
        row["relative_corrected"] = intervals.of(ratio, confidence=confidence)[1]
        row["relative_over_signal"] = {"value": None, "interval": None}
        if min(intervals.of(functools.partial(signal, m=each), "plain")[0] for each in (m, base)) > 0:
            row["relative_over_signal"] = found(lambda s: ratio(s) / (signal(s, m) / signal(s, base)))
    return row


def _ratio(sample: Sample, m: Measured, base: Measured, times: float) -> Quantity:
    return total(sample, m) / total(sample, base) * times


def _inverse(ratio: Found) -> Found:
    """1 over a ratio that may be 0 by its interval: its upper end is then None, for without bound."""
    value, interval = ratio["value"], ratio["interval"]
    if interval is not None:
        low, high = interval
        interval = [1 / high, 1 / low if low > 0 else None] if high > 0 else None
    return {"value": 1 / value if value and value > 0 else None, "interval": interval}


def recommended(rows: Sequence[Found]) -> Found | None:
    """The row that a step should take instead of the run's own; None if none is shown to be better.

    It has less noise at equal forwards, by an interval that counts all comparisons, and no more noise for its signal:
    fewer draws can have less of both, because noisy scores saturate the loss.
    """

    def is_better(row: Found) -> bool:
        interval, over = row.get("relative_corrected"), row.get("relative_over_signal", {"value": None})["value"]
        return interval is not None and interval[1] < 1 and (over is None or over < 1)

    return min(filter(is_better, rows), key=lambda row: row["relative"]["value"], default=None)
