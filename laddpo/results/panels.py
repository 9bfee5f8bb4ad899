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
    """Curves over one axis, and in `meaning` what they are. `level` is a rule to compare with; `is_exact` values are
    never smoothed; `is_log` takes a log axis where the values spread over more than a factor of ten. A page shows the
    curves with `is_main` larger."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    meaning: str
    level: float | None = None
    is_log: bool = False
    is_exact: bool = False
    is_main: bool = False


PANELS: tuple[Panel, ...] = (
    Panel(
        "Loss",
        "nats",
        (Curve("loss", "training"),),
        "What training makes smaller. A model that prefers neither answer has 0.693 with the sigmoid loss.",
        is_main=True,
    ),
    Panel(
        "Reward accuracy",
        "share of pairs",
        (Curve("rewards/accuracies", "training"),),
        "Share of pairs in which the chosen answer has the higher reward. Chance is 0.5.",
        level=0.5,
        is_main=True,
    ),
    Panel(
        "Reward margin",
        "reward",
        (Curve("rewards/margins", "training"),),
        "Reward of the chosen answer minus reward of the rejected one. Above 0 the model prefers the chosen answer.",
        level=0.0,
        is_main=True,
    ),
    Panel(
        "Reward drift",
        "reward",
        (Curve("rewards/chosen", "chosen"), Curve("rewards/rejected", "rejected", ACCENT, "--")),
        "Reward of each side: beta times the change of its ELBO since training began, or beta times its ELBO if the "
        "loss has no reference. If both fall, answers of both kinds become less likely.",
        level=0.0,
    ),
    Panel(
        "Exact match",
        "share of problems",
        (Curve("exact_match", "training"),),
        "Share of validation problems whose final answer is right.",
        is_main=True,
    ),
    Panel(
        "Standard error of the ELBO",
        "nats",
        (Curve("elbo/std_error", "training"),),
        "How uncertain the estimate of one answer's log-likelihood is, because the masks are random.",
        is_log=True,
    ),
    Panel(
        "Gradient norm",
        "before clipping",
        (Curve("grad_norm", "training"),),
        "Size of the update before it is clipped. A rise by a factor of ten is a sign of an unstable run.",
        is_log=True,
    ),
    Panel(
        "Learning rate",
        "",
        (Curve("learning_rate", "training"),),
        "Size of a step: it rises in the warmup, then follows the schedule.",
        is_exact=True,
    ),
)

DETAIL_PANELS: tuple[Panel, ...] = (
    Panel(
        "ELBO",
        "nats",
        (Curve("logps/chosen", "chosen"), Curve("logps/rejected", "rejected", ACCENT, "--")),
        "Estimate of the log-likelihood of an answer (a lower bound).",
    ),
    Panel(
        "ELBO minus reference, both sides",
        "nats",
        (Curve("kl", "training"),),
        "How far both answers together moved from the model before training.",
        level=0.0,
    ),
    Panel(
        "Speed",
        "tokens per second",
        (Curve("speed/tokens_per_s", "training"),),
        "Tokens of prompts and answers that training handles in a second.",
    ),
    Panel(
        "Peak memory",
        "GiB",
        (Curve("memory/peak_gib", "training"),),
        "The most memory that a step used.",
        is_exact=True,
    ),
)
