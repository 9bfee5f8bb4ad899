"""Held-out SFT rows: the loss per token of the model as it is, under fixed draws, so that runs can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from laddpo.core.budget import TokenBudget
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item
from laddpo.core.objectives import SftObjective
from laddpo.core.ranks import ALONE, Ranks
from laddpo.core.sharing import score_shared
from laddpo.core.tasks import example_item
from laddpo.evaluation.margins import WINDOW, evaluation_estimator

if TYPE_CHECKING:
    from laddpo.preference.encode import EncodedExample


def measured_rows(rows: Sequence[EncodedExample], diffusion_samples: int, seed: int) -> list[Item]:
    """The rows under the draws of every evaluation."""
    estimator = evaluation_estimator(diffusion_samples, seed)
    draws = estimator.draw_indices(0)
    return [example_item(row, estimator, draws) for row in rows]


def row_losses(
    denoiser: Denoiser, items: Sequence[Item], token_budget: int | TokenBudget, ranks: Ranks = ALONE
) -> np.ndarray:
    """-ELBO per response token of each row, in nats. # float64 [rows]"""
    found = []
    for start in range(0, len(items), WINDOW):
        window = items[start : start + WINDOW]
        draws = score_shared(denoiser, window, token_budget, ranks)
        found.append(SftObjective().losses(window, draws).cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)
