"""Held-out SFT rows: the loss per token of the model as it is, under fixed draws, so that runs can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from laddpo.core.budget import TokenBudget
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import Item
from laddpo.core.objectives import SftObjective
from laddpo.core.tasks import example_item
from laddpo.inputs.margins import evaluation_estimator, score_windows
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.processes.signals import StopFlag

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedExample


def measured_rows(rows: Sequence[EncodedExample], diffusion_samples: int, seed: int, block_length: int) -> list[Item]:
    """The rows under the draws of every evaluation. `block_length` of the model, 0 for a bidirectional one."""
    estimator = evaluation_estimator(diffusion_samples, seed, block_length)
    draws = estimator.draw_indices(0)
    return [example_item(row, estimator, draws) for row in rows]


def row_losses(
    denoiser: Denoiser,
    items: Sequence[Item],
    token_budget: int | TokenBudget,
    ranks: Ranks = ALONE,
    stop: StopFlag | None = None,
) -> np.ndarray:
    """-ELBO per response token of each row, in nats. # float64 [rows]. Raises `Stopped` as `score_windows` does."""
    scored = score_windows(denoiser, items, token_budget, ranks, stop)
    found = [SftObjective().losses(window, draws).cpu().numpy() for window, draws in scored]
    return np.concatenate(found) if found else np.zeros(0)
