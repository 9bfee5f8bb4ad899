"""Optimizers by name and the learning rate as a pure function of the step.

A schedule that is a function has no state to save, restore or advance twice. Settings, checks and the memory plan read
the tables, so nothing here imports torch when it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laddpo.processes.ranks import is_sharded

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    return OPTIMIZERS[name].build(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay)


def clip_gradients(parameters: Sequence[Tensor], longest: float) -> float:
    """Scale the gradients of all parameters together down to the norm `longest`; the norm they had.

    Of sharded parameters every rank must call this: the norm is that of the whole gradient.
    """
    import torch

    norm = torch.nn.utils.clip_grad_norm_(parameters, longest)
    return float(norm.full_tensor() if is_sharded(norm) else norm)


def _adamw(named: Mapping[str, Tensor], weight_decay: float, **settings) -> torch.optim.Optimizer:
    import torch

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


def _muon(named: Mapping[str, Tensor], weight_decay: float, **settings) -> torch.optim.Optimizer:
    from laddpo.core.muon import Muon

    matrices = {name: p for name, p in named.items() if p.ndim == 2 and is_in_a_block(name)}
    others = {name: p for name, p in named.items() if name not in matrices}
    return Muon(list(matrices.values()), weight_decay, [_adamw(others, weight_decay, **settings)] if others else [])


def is_in_a_block(name: str) -> bool:
    """Whether a parameter belongs to one of a model's numbered blocks, as in `layers.3.mlp.up_proj.weight`."""
    return any(part.isdigit() for part in name.split("."))


@dataclass(frozen=True)
class OptimizerKind:
    """A row of OPTIMIZERS.

    The memory plan reads the state: `matrix_moments` of a matrix in a block (other tensors have two), `is_8bit`, and
    `has_workspace` for one that updates through temporaries of the parameters' size. `shards`: it can update weights
    that are divided among processes. `needs_cuda`: it runs on a CUDA device only.
    """

    build: Callable[..., torch.optim.Optimizer]
    matrix_moments: int = 2
    is_8bit: bool = False
    has_workspace: bool = False
    shards: bool = False
    needs_cuda: bool = False


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, has_workspace=True, shards=True),
    "adamw_8bit": OptimizerKind(_adamw_8bit, is_8bit=True),
    "paged_adamw_8bit": OptimizerKind(_paged_adamw_8bit, is_8bit=True, needs_cuda=True),
    "muon": OptimizerKind(_muon, matrix_moments=1),
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
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))),
    "linear": lambda progress: max(0.0, 1.0 - progress),
    "constant": lambda progress: 1.0,
}
