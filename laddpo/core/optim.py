"""Optimizers by name and the learning rate as a pure function of the step.

A schedule that is a function has no state to save, restore or advance twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laddpo.core.ranks import is_sharded


def build_optimizer(
    name: str,
    named_parameters: Mapping[str, Tensor],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters in one group; its learning rate is set before every step.

    Weight decay applies to matrices, not to vectors (norm weights, biases), as is usual for transformers.
    """
    matrices = [p for p in named_parameters.values() if p.ndim >= 2]
    vectors = [p for p in named_parameters.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return OPTIMIZERS[name](groups, lr=0.0, betas=betas, eps=eps)


def clip_gradients(parameters: Sequence[Tensor], longest: float) -> float:
    """Scale the gradients of all parameters together down to the norm `longest`; the norm they had.

    Of sharded parameters every rank must call this: the norm is that of the whole gradient.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, longest)
    return float(norm.full_tensor() if is_sharded(norm) else norm)


def _adamw(groups, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **settings)


def _adamw_8bit(groups, **settings) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def _paged_adamw_8bit(groups, **settings) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(groups, **settings)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _paged_adamw_8bit,
}


def learning_rate(schedule: str, step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0) out of `total_steps`.

    Rises linearly over the warm-up, the first step already above 0, then follows SCHEDULES.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * SCHEDULES[schedule](progress)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: max(0.0, 1.0 - progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))),
}
