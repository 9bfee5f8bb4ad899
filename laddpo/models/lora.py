"""The arithmetic of PEFT's LoRA layers with fewer passes over memory; what they are, hold and save stays PEFT's.

PEFT adds an adapter in four passes over the layer's output: the product of the two small matrices, its scaling, (for
4-bit layers) a copy of the base's output, and the sum. Here the second matrix product adds its scaled result to the
base's output directly, which is also rounded once instead of three times.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

ADAPTER = "default"


class WideLinear(nn.Linear):
    """A float32 weight that works in its input's dtype: no wide copy of the activations, a wide gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def widen(layer: nn.Module, dtype: torch.dtype) -> None:
    """Keep the adapter of a LoRA layer in `dtype`. PEFT would keep it in the base's, or widen every activation."""
    layer.cast_input_dtype_enabled = False
    for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
        part.to(dtype)
        part.__class__ = WideLinear
    if ADAPTER in layer.lora_magnitude_vector:  # DoRA's
        layer.lora_magnitude_vector[ADAPTER].to(dtype)


def add_in_one_product(layer: nn.Module) -> None:
    """Let a LoRA layer add its adapter without passes of its own. DoRA, which rescales the sum, stays as it is."""
    if ADAPTER not in layer.lora_variant:
        layer.__class__ = _one_product_class(type(layer))


@functools.cache
def _one_product_class(kind: type) -> type:
    return type(kind.__name__, (_OneProduct, kind), {})


class _OneProduct:
    """In front of a PEFT LoRA layer: base(x) + scaling * (x A^T) B^T, the sum inside the second product."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        leading, x = x.shape[:-1], x.flatten(0, -2)
        result = self.base_layer(x, *args, **kwargs)
        low = self.lora_A[ADAPTER](x).to(result.dtype)
        up = self.lora_B[ADAPTER].weight.to(result.dtype).t()
        # not in place where the base's output is a view of something wider, as an int8 layer's may be
        add = torch.addmm if result._is_view() else Tensor.addmm_
        return add(result, low, up, alpha=self.scaling[ADAPTER]).unflatten(0, leading)
