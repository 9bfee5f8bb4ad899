"""Weights divided among the processes of a run (FSDP2), for models larger than a card and for full fine-tuning.

Every block, and what is outside the blocks, is put together for the moment in which it computes. That needs every rank
to run the model equally often, which ranks with shares of different size do not; `lockstep` lets the ones that are done
take part in the others' passes with two tokens that count nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from laddpo.core.elbo import PackedSequences
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.processes.ranks import Ranks


def shard_model(model, ranks: Ranks, device: torch.device) -> None:
    """Divide the weights in place, moving them to `device` block by block: the whole model is never on one device.

    Adapters must be on it, and `requires_grad` set, before. Gradients are summed over ranks, not averaged: the loss of
    a step is already divided by its items.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a plain sum, on gloo too


def is_sharded(model) -> bool:
    """Whether only a whole forward can put the weights together."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


class ShardedDenoiser(TransformerDenoiser):
    """A denoiser whose model is sharded over `ranks`."""

    def __init__(self, *args, ranks: Ranks, **kwargs):
        super().__init__(*args, **kwargs)
        self.ranks = ranks

    @contextlib.contextmanager
    def lockstep(self, with_gradients: bool = False) -> Iterator[None]:
        """Around all that this rank computes of something that every rank has a share of.

        `with_gradients`: each forward is followed by its backward before the next. An error inside leaves at once; the
        others learn of it when this process ends.
        """
        announced = self.model.register_forward_pre_hook(lambda *_: self._announce(), prepend=True)
        try:
            yield
        finally:
            announced.remove()
        while self.ranks.any(False):
            self._idle(with_gradients)
        self.model.reshard()  # weights outside the blocks stay together after a forward, and would go stale

    def _announce(self) -> None:
        self.ranks.any(True)  # before the first exchange of a forward, so that every rank is in one

    def _idle(self, with_gradients: bool) -> None:
        """One pass over two tokens, so that the others can gather their weights."""
        with torch.set_grad_enabled(with_gradients):
            logps = self.token_logps(self._two_tokens())
            if with_gradients:
                (0.0 * logps.sum()).backward()

    def _two_tokens(self) -> PackedSequences:
        def tensor(*values: int) -> Tensor:
            return torch.tensor(values, device=self.device)

        return PackedSequences(tensor(0, self.mask_token_id), tensor(0, 1), [2], tensor(1), tensor(0))
