"""Which operators run, and how many bytes they read and write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_WORK = ("empty", "empty_like", "detach", "alias", "_unsafe_view")


@dataclass(frozen=True)
class Operator:
    """`written`: numbers of its result; `bytes`: of its inputs and its result together."""

    name: str
    written: int
    bytes: int


class Operators(TorchDispatchMode):
    """Inside the `with` block every operator that computes is recorded; views and allocations are not."""

    def __init__(self):
        super().__init__()
        self.ran: list[Operator] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), function.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and not function.is_view and name not in NO_WORK:
            inputs = [args, {key: value for key, value in kwargs.items() if key != "out"}]
            tensors = [t for t in tree_leaves([result, inputs]) if isinstance(t, torch.Tensor)]
            self.ran.append(Operator(name, result.numel(), sum(t.nbytes for t in tensors)))
        return result

    def writing(self, size: int) -> list[str]:
        """Names of those whose result has `size` numbers."""
        return [operator.name for operator in self.ran if operator.written == size]
