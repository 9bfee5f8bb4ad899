"""The bridge between the objective and a transformer: packed masked sequences in, log-probabilities out.

`TransformerDenoiser` is the `Denoiser` of laddpo/core/elbo.py for any model whose forward takes `lengths`, `rows` and
`targets` (laddpo/models/llada.py).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from laddpo.errors import UserError
from laddpo.models.offload import offloaded_activations

if TYPE_CHECKING:
    from laddpo.core.elbo import PackedSequences


class TransformerDenoiser:
    """Scores masked tokens with `model`; `head_chunk` rows of logits live at a time (None: chosen by vocabulary).

    `autocast`: the arithmetic of float32 weights trained in mixed precision; None computes in the weights' own.
    Everything runs inside the model's forward, so that wrappers which gather or reduce around it (DDP, FSDP) see it.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_token_id: int,
        head_chunk: int | None = None,
        autocast: torch.dtype | None = None,
        offload: bool = False,
    ):
        self.model = model
        self.mask_token_id = mask_token_id
        self.head_chunk = head_chunk
        self.autocast = autocast
        self.offload = offload

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def block_length(self) -> int:
        """Of the model's blocks; 0 where it is bidirectional."""
        return self.model.block_length or 0

    def token_logps(self, packed: PackedSequences) -> Tensor:
        """log p(target) at every masked token, differentiable. # float32 [M], float64 for a float64 model"""
        if packed.scores_first and self.model.reads_before:
            raise UserError(
                "a response follows an empty prompt, and this model reads the score of a token before it: its first "
                "token has none. Give every prompt at least one token."
            )
        wants_offload = self.offload and torch.is_grad_enabled()
        with (
            torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None),
            offloaded_activations(self.model) if wants_offload else contextlib.nullcontext(),
        ):
            output = self.model(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                lengths=packed.lengths,
                contexts=packed.contexts,
                rows=packed.rows,
                targets=packed.targets,
                head_chunk=self.head_chunk,
            )
        return output.token_logps
