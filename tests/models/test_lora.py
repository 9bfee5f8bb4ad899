"""LoRA layers compute what PEFT's do, with no pass over the output beside the two products."""

import copy

import pytest
import torch

from laddpo.models import loading
from laddpo.models.adapters import adapter_disabled, attach_lora
from laddpo.models.lora import WideLinear
from tests.models.operators import Operators
from tests.models.test_adapters import scramble
from tests.models.test_quantization import INT8, NF4

WIDTH, MLP = 64, 128
KINDS = {"plain": None, "nf4": NF4, "int8": INT8}


@pytest.fixture(params=KINDS)
def layer(request, tiny_model, tmp_path):
    """An up-projection of a model stored as the parameter says, under an adapter that changes something."""
    if request.param == "plain":
        model = tiny_model(d_model=WIDTH, mlp_hidden_size=MLP)
    else:
        pytest.importorskip("bitsandbytes")
        loading.save_model(tiny_model(d_model=WIDTH, mlp_hidden_size=MLP), tmp_path)
        model = loading.load_model(str(tmp_path), quantization=KINDS[request.param])
    attach_lora(model, r=4, alpha=6)
    return scramble(model).get_submodule("model.transformer.blocks.0.up_proj")


def as_peft(layer):
    """The same layer with PEFT's own arithmetic; the adapter is a copy."""
    theirs = copy.copy(layer)
    theirs.__class__ = type(layer).__mro__[2]
    assert theirs.__class__.__module__.startswith("peft.")
    theirs._modules = {**layer._modules, "lora_A": copy.deepcopy(layer.lora_A), "lora_B": copy.deepcopy(layer.lora_B)}
    return theirs


def values_and_gradients(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    found = [out.detach(), x.grad]
    return found + [part["default"].weight.grad for part in (layer.lora_A, layer.lora_B)]


def inputs(*leading):
    return torch.randn(*leading, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("leading", [(1, 7), (2, 3), (5,)])
def test_values_and_gradients_are_pefts_to_rounding(layer, leading):
    ours, theirs = (values_and_gradients(which, inputs(*leading)) for which in (layer, as_peft(layer)))
    is_int8 = "8bit" in type(layer.get_base_layer()).__name__  # which computes in float16
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-2 if is_int8 else 1e-5)
    assert all(gradient.abs().max() > 0 for gradient in ours[1:])


def test_without_its_adapter_a_layer_is_its_base_to_the_bit(layer):
    x = inputs(1, 7)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_a_fresh_adapter_changes_no_bit(tiny_model, random_ids):
    """What the margin of 0 at step 0 rests on."""
    model, ids = tiny_model(dtype=torch.bfloat16), random_ids(2, 9)
    attach_lora(model, r=4)
    with torch.no_grad():
        fresh = model(input_ids=ids).logits
        with adapter_disabled(model):
            assert torch.equal(model(input_ids=ids).logits, fresh)


def test_an_adapter_costs_no_pass_over_the_output_beside_its_product(tiny_model):
    model = tiny_model(d_model=WIDTH, mlp_hidden_size=MLP)
    attach_lora(model, r=4)
    layer, x = model.get_submodule("model.transformer.blocks.0.up_proj"), inputs(1, 7).requires_grad_()
    with Operators() as forward:
        out = layer(x)
    slope = torch.ones_like(out)
    with Operators() as backward:
        out.backward(slope)
    assert forward.writing(out.numel()) == ["mm", "addmm_"], "the base's product, and the adapter's into it"
    assert backward.writing(out.numel()) == []
    with Operators() as peft:
        as_peft(layer)(x)
    assert peft.writing(out.numel()) == ["mm", "mm", "mul", "add"]


def test_dora_keeps_pefts_arithmetic_and_every_adapter_its_wide_weights(tiny_model):
    model = tiny_model(dtype=torch.bfloat16)
    attach_lora(model, r=2, use_dora=True)
    layer = model.get_submodule("model.transformer.blocks.1.q_proj")
    assert type(layer).__module__.startswith("peft.")
    assert type(layer.lora_A["default"]) is WideLinear
    assert layer.lora_A["default"].weight.dtype == torch.float32
