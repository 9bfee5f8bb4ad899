"""What waits in the computer's memory while the GPU works: activations until the backward pass, the embedding table.

Both are copies and lookups, so every value stays bit for bit the same; the price is time on the bus.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST_BYTES = 2**16  # smaller tensors stay: their copies would cost more time than they save memory


@contextlib.contextmanager
def offloaded_activations(model: nn.Module, smallest_bytes: int = SMALLEST_BYTES) -> Iterator[None]:
    """Around a forward pass: what autograd keeps lies in host memory, each storage once, until the backward pass.

    The model's own weights stay where they are. With gradient checkpointing that is one tensor a block.
    """
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    copies: dict[int, tuple[StorageWeakRef, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor | tuple:
        storage = tensor.untyped_storage()
        if storage._cdata in own or storage.nbytes() < smallest_bytes:
            return tensor
        known = copies.get(storage._cdata)
        if known is None or known[0].expired():
            # an address is free for another storage only when its last weak reference is gone, so none is mistaken
            known = copies[storage._cdata] = (StorageWeakRef(storage), _to_host(tensor))
        return known[1], tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.device

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        host, dtype, offset, size, stride, device = packed
        back = host.to(device, non_blocking=True)
        return torch.empty(0, dtype=dtype, device=device).set_(back.untyped_storage(), offset, size, stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _to_host(tensor: Tensor) -> Tensor:
    """The bytes behind a tensor, views and all. # uint8 [storage bytes]

    On CUDA the copy runs behind the kernels that made the tensor and before any that may reuse its memory: same stream.
    """
    everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    host = torch.empty(len(everything), dtype=torch.uint8, pin_memory=tensor.is_cuda)
    return host.copy_(everything, non_blocking=True)


class HostEmbedding(nn.Module):
    """A frozen embedding whose table is in host memory; only the looked-up rows travel to `device`.

    The table is no parameter: it moves with nothing and is saved with nothing.
    """

    def __init__(self, table: nn.Embedding, device: torch.device):
        super().__init__()
        self.weight = table.weight.detach().to("cpu")
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids.to("cpu"), self.weight).to(self.device, non_blocking=True)


def keep_embeddings_on_host(model) -> None:
    """Put the model's embedding table into host memory. Call it after loading, for a base that stays frozen."""
    table = model.get_input_embeddings()
    model.set_input_embeddings(HostEmbedding(table, table.weight.device))
