"""Muon for the matrices of a model's blocks, beside another optimizer for everything else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MUON_MOMENTUM = 0.95  # Jordan et al. 2024; Adam's betas suit Adam


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of numbered blocks, and `others` for everything else: embedding, head and vectors.

    Muon makes the momentum of a matrix orthogonal before it is added (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). Its update is scaled to the size that AdamW's usually has (Liu et al. 2025,
    arXiv 2502.16982), so that one learning rate serves both. It keeps one moment of a matrix, AdamW two.
    """

    def __init__(self, matrices: Sequence[Tensor], weight_decay: float, others: Sequence[torch.optim.Optimizer]):
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            scaled = {"lr": 0.0, "momentum": MUON_MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(torch.optim.Muon(list(matrices), weight_decay=weight_decay, **scaled))
        self.parts += others
        super().__init__([group for part in self.parts for group in part.param_groups], {})

        for part in self.parts:  # one state and one list of groups for this optimizer and its parts
            part.state = self.state

    @torch.no_grad()
    def step(self) -> None:
        for part in self.parts:
            part.step()
