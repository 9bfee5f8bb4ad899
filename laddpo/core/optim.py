"""Optimizers by name and the learning rate as a pure function of the step.

A schedule that is a function has no state to save, restore or advance twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laddpo.processes.ranks import is_sharded

MUON_MOMENTUM = 0.95  # Jordan et al. 2024; Adam's betas suit Adam


def build_optimizer(
    name: str,
    named_parameters: Mapping[str, Tensor],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; its learning rate is set before every step.

    Weight decay applies to matrices, not to vectors (norm weights, biases), as is usual for transformers.
    """
    return OPTIMIZERS[name](named_parameters, betas=betas, eps=eps, weight_decay=weight_decay)


def clip_gradients(parameters: Sequence[Tensor], longest: float) -> float:
    """Scale the gradients of all parameters together down to the norm `longest`; the norm they had.

    Of sharded parameters every rank must call this: the norm is that of the whole gradient.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, longest)
    return float(norm.full_tensor() if is_sharded(norm) else norm)


def _adamw(named: Mapping[str, Tensor], weight_decay: float, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(named, weight_decay), lr=0.0, **settings)


def _adamw_8bit(named: Mapping[str, Tensor], weight_decay: float, **settings) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(_groups(named, weight_decay), lr=0.0, **settings)


def _paged_adamw_8bit(named: Mapping[str, Tensor], weight_decay: float, **settings) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(_groups(named, weight_decay), lr=0.0, **settings)


def _groups(named: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors, which do not."""
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of numbered blocks, AdamW for everything else: embedding, head and vectors.

    Muon makes the momentum of a matrix orthogonal before it is added (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). Its update is scaled to the size that AdamW's usually has (Liu et al. 2025,
    arXiv 2502.16982), so that one learning rate serves both. It keeps one moment of a matrix, AdamW two.
    """

    def __init__(self, named: Mapping[str, Tensor], weight_decay: float, **settings):
        hidden = {name: p for name, p in named.items() if p.ndim == 2 and is_in_a_block(name)}
        others = {name: p for name, p in named.items() if name not in hidden}
        self.parts: list[torch.optim.Optimizer] = []
        if hidden:
            scaled = {"lr": 0.0, "momentum": MUON_MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(torch.optim.Muon(list(hidden.values()), weight_decay=weight_decay, **scaled))
        if others:
            self.parts.append(_adamw(others, weight_decay, **settings))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:  # one state and one list of groups for this optimizer and its parts
            part.state = self.state

    @torch.no_grad()
    def step(self) -> None:
        for part in self.parts:
            part.step()


def is_in_a_block(name: str) -> bool:
    """Whether a parameter belongs to one of a model's numbered blocks, as in `layers.3.mlp.up_proj.weight`."""
    return any(part.isdigit() for part in name.split("."))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _paged_adamw_8bit,
    "muon": Muon,
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
