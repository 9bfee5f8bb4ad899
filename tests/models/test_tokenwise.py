"""Rotation and gated product equal their plain autograd forms to the bit, and keep less."""

import pytest
import torch

from laddpo.models.tokenwise import gated, rotate
from tests.models.operators import Operators

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def plain_rotate(x, cos, sin):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    cos, sin = (torch.cat((half, half), dim=-1) for half in (cos, sin))
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def plain_gated(gate, up):
    return torch.nn.functional.silu(gate) * up


def values_and_gradients(function, inputs, constants=()):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, *constants)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def saved_elements(function, inputs, constants=()):
    """Numbers that autograd keeps, each storage once, the inputs' own included."""
    leaves, kept = [x.clone().requires_grad_() for x in inputs], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*leaves, *constants)
    return sum({t.untyped_storage().data_ptr(): t.numel() for t in kept}.values())


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(length, head_dim):
    turned = torch.arange(length)[None, :, None, None] * 0.37 ** torch.arange(head_dim // 2)
    return turned.cos(), turned.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_first", [False, True])
def test_rotation_and_its_gradient_are_the_plain_ones_to_the_bit(dtype, heads_first):
    x = drawn(2, 3, 7, 8, dtype=dtype).transpose(1, 2) if heads_first else drawn(2, 7, 3, 8, dtype=dtype)
    ours, plain = (values_and_gradients(f, [x], angles(7, 8)) for f in (rotate, plain_rotate))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert ours[0].dtype == dtype


def test_a_rotation_keeps_no_activation():
    assert saved_elements(rotate, [drawn(1, 5, 2, 8)], angles(5, 8)) == 2 * 5 * 4  # cos and sin alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gated_product_and_its_gradients_are_the_plain_ones_to_the_bit(dtype):
    inputs = [3 * drawn(5, 16, dtype=dtype, seed=seed) for seed in (1, 2)]
    ours, plain = (values_and_gradients(f, inputs) for f in (gated, plain_gated))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_without_gradients_the_gated_product_takes_one_new_tensor():
    gate, up = (3 * drawn(5, 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    with torch.no_grad(), Operators() as operators:
        out = gated(gate, up)
    assert torch.equal(out, plain_gated(gate, up))
    assert operators.writing(out.numel()) == ["silu", "mul_"]


def test_the_gated_product_keeps_its_two_inputs_and_the_plain_one_a_third_tensor():
    inputs = [drawn(5, 16, seed=seed) for seed in (1, 2)]
    assert [saved_elements(f, inputs) for f in (gated, plain_gated)] == [2 * 80, 3 * 80]


def test_gradients_agree_with_differences():
    inputs = [drawn(3, 4, dtype=torch.float64, seed=seed).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(gated, inputs)
    cos, sin = (part.double() for part in angles(3, 4))
    x = drawn(1, 3, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), [x])
