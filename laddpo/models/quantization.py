"""4- and 8-bit weights by bitsandbytes: what is quantised, and that one input has one output.

In: the fields of the config group `quantization`. Out: a config for transformers' loader, and after loading a model
whose blocks are quantised, whose head and embedding are not, and which computes the same in every mode.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import nn

from laddpo.errors import choose
from laddpo.models.bitsandbytes_import import import_bitsandbytes
from laddpo.models.families import Family


def quantization_config(quantization: dict[str, Any] | None, family: Family, dtype: torch.dtype):
    """BitsAndBytesConfig for the config group, or None when nothing is quantised. The head and embedding never are.

    Unpacked weights are multiplied in `dtype` unless bnb_4bit_compute_dtype says otherwise. The head is skipped by its
    FULL name: in LLaDA the blocks' down-projections share its last name, `ff_out`.
    """
    settings = dict(quantization or {})
    if not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return None
    from transformers import BitsAndBytesConfig

    import_bitsandbytes()
    compute = settings.pop("bnb_4bit_compute_dtype", None)
    if isinstance(compute, str):
        compute = choose(DTYPES, compute, "quantization.bnb_4bit_compute_dtype", "laddpo/models/quantization.py")
    known = {key: value for key, value in settings.items() if key in QUANTIZATION_FIELDS and value is not None}
    if settings.get("load_in_4bit"):
        known["bnb_4bit_compute_dtype"] = dtype if compute is None else compute
    return BitsAndBytesConfig(llm_int8_skip_modules=[family.layout.head], **known)


def quantized_linear(linear: nn.Linear, quantizer) -> nn.Module:
    """The layer as transformers' loader would store it under this BitsAndBytesConfig, on the weight's device.

    For weights that are made here and were never a checkpoint. What is returned shares nothing with `linear`.
    """
    from bitsandbytes import nn as quantized

    inputs, outputs, weight = linear.in_features, linear.out_features, linear.weight.detach()
    if quantizer.load_in_4bit:
        settings = {
            "compress_statistics": quantizer.bnb_4bit_use_double_quant,
            "quant_type": quantizer.bnb_4bit_quant_type,
        }
        layer = quantized.Linear4bit(
            inputs, outputs, False, compute_dtype=quantizer.bnb_4bit_compute_dtype, device="meta", **settings
        )
        layer.weight = quantized.Params4bit(weight, module=layer, **settings).to(weight.device)
        return layer
    threshold = quantizer.llm_int8_threshold
    layer = quantized.Linear8bitLt(inputs, outputs, False, False, threshold=threshold, device="meta")
    layer.weight = quantized.Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
    return layer


def unpack_4bit(model: nn.Module) -> None:
    """Replace every 4-bit layer by a plain one that holds what its stored numbers mean, in its compute dtype."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(module.compute_dtype)
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    model.is_loaded_in_4bit = False


def settle_quantized(model: nn.Module, family: Family) -> None:
    """Freeze a quantised model, check which layers are, and hold their mode.

    On a CPU bitsandbytes has other kernels for eval mode: a reference computed in it differs from the policy by up to
    0.02 nats a token, and a margin that should be 0 is not. The layers stay in training mode, whatever the model does.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            in_block = re.match(family.layout.block, name) is not None
            is_quantized = isinstance(module, Linear4bit | Linear8bitLt)
            assert in_block == is_quantized, f"{name} must be quantised exactly when it is in a block"
            if is_quantized:
                module.train()
                module.train = partial(_keep_mode, module)


def _keep_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

QUANTIZATION_FIELDS = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_threshold",
)
