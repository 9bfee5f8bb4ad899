"""The vocabulary head on chosen rows: chunked equals full, forward and backward, and the full logits never exist."""

import pytest
import torch

from laddpo.models.head import token_logps


def inputs(rows=11, width=6, vocab=20, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=g)


def plain(hidden, weight, targets):
    return (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 4, 11, 100, None])
def test_chunked_values_and_gradients_equal_the_full_log_softmax(chunk):
    hidden, weight, targets = inputs()
    factors = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    logps = token_logps(hidden, weight, targets, chunk)
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(logps, expected, atol=1e-13, rtol=0)
    got = torch.autograd.grad((logps * factors).sum(), [hidden, weight])
    want = torch.autograd.grad((expected * factors).sum(), [hidden, weight])
    torch.testing.assert_close(got, want, atol=1e-13, rtol=0)


def test_a_frozen_head_gives_the_same_gradient_to_its_input():
    hidden, weight, targets = inputs()
    (both,) = torch.autograd.grad(token_logps(hidden, weight, targets, 4).sum(), [hidden])
    (frozen,) = torch.autograd.grad(token_logps(hidden, weight.detach(), targets, 4).sum(), [hidden])
    assert torch.equal(both, frozen)


def test_gradients_pass_gradcheck():
    hidden, weight, targets = inputs(rows=5)
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, targets, 2), (hidden, weight))


def test_no_rows_give_no_values():
    hidden, weight, targets = inputs()
    logps = token_logps(hidden[:0], weight, targets[:0])
    assert logps.shape == (0,)
    logps.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_bfloat16_is_reduced_in_float32():
    hidden, weight, targets = inputs(rows=64, width=32, vocab=500, dtype=torch.bfloat16)
    logps = token_logps(hidden, weight, targets)
    assert logps.dtype == torch.float32
    rounded = (hidden @ weight.t()).float()  # the product is bfloat16 on a CPU; nothing after it is
    torch.testing.assert_close(logps, rounded.log_softmax(-1).gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=0)
    logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_autocast_multiplies_in_the_narrow_dtype_and_returns_float32():
    hidden, weight, targets = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = token_logps(hidden, weight, targets)
    narrow = token_logps(hidden.bfloat16(), weight.bfloat16(), targets)
    assert logps.dtype == torch.float32
    assert torch.equal(logps, narrow)
    logps.sum().backward()
    assert hidden.grad.dtype == torch.float32


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_of_more_than_one_chunk_never_exist_together():
    hidden, weight, targets = inputs(rows=300, width=4, vocab=100, dtype=torch.float32)
    with LargestTensor() as chunked:
        token_logps(hidden, weight, targets, 10).sum().backward()
    with LargestTensor() as whole:
        token_logps(hidden, weight, targets, 300).sum().backward()
    assert chunked.elements == 300 * 4, "the hidden states are the largest tensor; a chunk of logits is 10 x 100"
    assert whole.elements == 300 * 100, "the probe sees full logits where they exist"
