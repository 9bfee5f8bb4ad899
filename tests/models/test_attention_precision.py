"""Attention of a CPU under autocast is computed in float32 from the narrow queries, keys and values."""

import pytest
import torch

from laddpo.models.attention import PackedLayout, attend


@pytest.mark.parametrize("lengths", [None, [5, 5, 2]], ids=["padded", "packed"])
def test_autocast_attention_is_that_of_float32_on_the_same_numbers(tiny_model, lengths):
    block = tiny_model().model["transformer"]["blocks"][0]
    torch.manual_seed(0)
    narrow = [torch.randn(1, 12, 4, 8).bfloat16().requires_grad_() for _ in range(3)]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    layout = lengths and PackedLayout.build(lengths, "batched", torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(block, *narrow, None, layout)
    expected = attend(block, *wide, None, layout)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())
    weights = torch.randn(found.shape).bfloat16()  # gradients that both can represent
    found.backward(weights)
    expected.backward(weights.float())
    for one, other in zip(narrow, wide, strict=True):
        assert torch.equal(one.grad, other.grad.bfloat16())
