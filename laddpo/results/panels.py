"""The curves of a training run: which metrics share an axis, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from laddpo.results.figures import ACCENT, DARK


@dataclass(frozen=True)
class Curve:
    """One metric as a line: its name in metrics.jsonl, how it is called in the legend, how it looks."""

    metric: str
    label: str
    color: str = DARK
    style: str = "-"
    marker: str = ""


@dataclass(frozen=True)
class Panel:
    """Curves over one axis. `level` is a rule to compare with; `is_exact` values are never smoothed; `is_log` takes a
    log axis where the values spread over more than a factor of ten."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    level: float | None = None
    is_log: bool = False
    is_exact: bool = False


PANELS: tuple[Panel, ...] = (
    Panel("Loss", "nats", (Curve("loss", "training"),)),
    Panel("Reward accuracy", "share of pairs", (Curve("rewards/accuracies", "training"),), level=0.5),
    Panel("Reward margin", "reward", (Curve("rewards/margins", "training"),), level=0.0),
    Panel(
        "Reward drift",
        "reward",
        (Curve("rewards/chosen", "chosen"), Curve("rewards/rejected", "rejected", ACCENT, "--")),
        level=0.0,
    ),
    Panel("Exact match", "share of problems", (Curve("exact_match", "training"),)),
    Panel("Standard error of the ELBO", "nats", (Curve("elbo/std_error", "training"),), is_log=True),
    Panel("Gradient norm", "before clipping", (Curve("grad_norm", "training"),), is_log=True),
    Panel("Learning rate", "", (Curve("learning_rate", "training"),), is_exact=True),
)

DETAIL_PANELS: tuple[Panel, ...] = (
    Panel("ELBO", "nats", (Curve("logps/chosen", "chosen"), Curve("logps/rejected", "rejected", ACCENT, "--"))),
    Panel("ELBO minus reference, both sides", "nats", (Curve("kl", "training"),), level=0.0),
    Panel("Speed", "tokens per second", (Curve("speed/tokens_per_s", "training"),)),
    Panel("Peak memory", "GiB", (Curve("memory/peak_gib", "training"),), is_exact=True),
)
