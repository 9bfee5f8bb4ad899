"""The two labels of unpaired rows: how many rows have each, and what weights balance them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from laddpo.errors import UserError
from laddpo.preference.prepared import SPLITS
from laddpo.preference.reading.bad_rows import BadRow

LABELS = ("undesirable", "desirable")
MOST = 4 / 3  # of desirable over undesirable weight; the least is 1


def balanced_weights(desirable: int, undesirable: int) -> dict[str, float]:
    """The setting of dpo, and its value, that brings weight x rows of desirable over undesirable into [1, 4/3] beside
    another weight of 1. Empty if both may be 1. Source: KTO (2402.01306), section 4.2; TRL warns by the same bounds."""
    if desirable < undesirable:
        return {"desirable_weight": math.ceil(100 * undesirable / desirable) / 100}
    if desirable > MOST * undesirable:
        return {"undesirable_weight": math.floor(100 * desirable / undesirable) / 100}
    return {}


def balance_note(desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to set where weight x rows of desirable over undesirable is not in [1, 4/3]; None where it is."""
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if 1 <= ratio <= MOST:
        return None
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, **balanced_weights(desirable, undesirable)}
    settings = " ".join(f"dpo.{name}={value:g}" for name, value in weights.items())
    return (
        f"desirable rows weigh {ratio:.3g} times as much as undesirable ones in training, KTO asks for 1 to 4/3: "
        f"set {settings}"
    )


def label_lines(labels: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The labels of each split, and the weights that balance those of the training rows."""
    lines = [
        f"  labels   {split}: {labels[split]['desirable']:,} desirable, {labels[split]['undesirable']:,} undesirable"
        for split in SPLITS
        if split in labels
    ]
    note = balance_note(labels["train"]["desirable"], labels["train"]["undesirable"], 1.0, 1.0)
    return [*lines, f"  labels   {note}"] if note else lines


def require_both_labels(labels: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse rows of which training would see one label."""
    counts = labels.get("train", dict.fromkeys(LABELS, 0))
    for lacking, other in (LABELS, LABELS[::-1]):
        if counts[lacking]:
            continue
        more = " Or learn the desirable ones alone by python -m laddpo.sft." if other == "desirable" else ""
        raise UserError(
            f"Of {counts[other]:,} unpaired rows for training none is {lacking} (DATA-123): one label alone says "
            f"nothing about what to prefer. Add {lacking} rows.{more}"
        )


def conflicting(place: str, label: bool, other_place: str) -> BadRow:
    """The bad row for a completion that another row gives the other label."""
    problem = (
        f"is {str(label).lower()}, and {other_place} has the same completion of the same prompt with the other label"
    )
    return BadRow(place, "DATA-122", "label", problem, "Keep the label that more people gave.")
