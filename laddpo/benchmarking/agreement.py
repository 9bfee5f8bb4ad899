"""What 4-bit weights change: the score of a pair and its gradient, against the weights that they were made from.

Three models of the same random weights: as they are, quantised, and quantised and unpacked again. The first difference
is what storing in 4 bits costs; the second, against the unpacked weights, is the kernels' rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from laddpo.benchmarking.contenders import Ours
from laddpo.core.gradient import Item, score_items
from laddpo.models.adapters import trainable_parameters
from laddpo.preference.encoding.encode import EncodedPair


def observe(ours: Ours, pairs: Sequence[EncodedPair], draws: int) -> dict[str, Any]:
    """Scores of every draw, how far policy and reference are apart at step 0, and the gradient of the step, flat.

    # scores float64 [pairs, 2, draws] in nats, lengths [pairs, 2], gradient float32 [parameters], on the CPU
    """
    items = ours.items(pairs, draws)
    policy = score_items(ours.denoiser, items, ours.token_budget).cpu()
    reference = torch.as_tensor(ours.reference(items))
    ours.prepare(pairs, draws)
    ours.step(pairs, draws)
    parameters = trainable_parameters(ours.model).values()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in parameters if p.grad is not None])
    ours.model.zero_grad(set_to_none=True)
    return {
        "scores": policy,
        "lengths": lengths_of(items),
        "margin_at_start": float((policy - reference).abs().max()),
        "gradient": gradient,
    }


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Nats per response token between the mean scores, root mean square and largest; and the gradient's error."""
    per_token = (found["scores"].mean(-1) - wanted["scores"].mean(-1)) / found["lengths"]
    margins = [observed["scores"].mean(-1) for observed in (found, wanted)]
    of_margin = (margins[0][:, 0] - margins[0][:, 1]) - (margins[1][:, 0] - margins[1][:, 1])
    error = (found["gradient"] - wanted["gradient"]).norm() / wanted["gradient"].norm()
    return {
        "nats_per_token_rms": float(per_token.square().mean().sqrt()),
        "nats_per_token_largest": float(per_token.abs().max()),
        "margin_rms": float(of_margin.square().mean().sqrt()),
        "gradient_relative": float(error),
    }


def lengths_of(items: Sequence[Item]) -> torch.Tensor:
    """Response tokens. # float64 [items, 2]"""
    return torch.tensor([item.response_tokens for item in items], dtype=torch.float64)
