"""The layout of packed sequences, and which route attention takes."""

import itertools

import pytest
import torch

from laddpo.errors import UserError
from laddpo.models import attention
from laddpo.models.attention import PackedLayout, eager_attention, length_order, token_order, varlen_problem


def test_neighbours_of_equal_length_form_one_run():
    assert PackedLayout([3, 3, 5, 3]).runs == [(0, 2, 3), (6, 1, 5), (11, 1, 3)]


def test_lengths_are_reordered_only_when_equal_ones_are_apart():
    assert length_order([3, 3, 5]) is None
    assert length_order([5, 3, 3, 4]) is None
    assert length_order([3, 5, 3]) == [0, 2, 1]


def test_token_order_moves_whole_sequences():
    assert token_order([2, 1, 2], [1, 0, 2]).tolist() == [2, 0, 1, 3, 4]


def test_sixteen_alternating_sequences_cost_two_attention_calls_per_block(tiny_model, packed_input, monkeypatch):
    model = tiny_model()
    calls = []
    plain = attention._interface
    monkeypatch.setattr(attention, "_interface", lambda *a, **k: calls.append(a[1].shape) or plain(*a, **k))
    lengths = [6, 9] * 8
    ids, positions = packed_input(lengths)
    model(input_ids=ids[None], position_ids=positions[None], lengths=lengths)
    assert [tuple(shape) for shape in calls] == [(8, 6, 4, 8), (8, 9, 4, 8)] * 2


def test_the_variable_length_kernel_says_why_it_cannot_serve(monkeypatch):
    assert "not on cpu" in varlen_problem(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert "no torch.nn.attention.varlen" in varlen_problem(torch.device("cuda"), torch.bfloat16)


def test_the_variable_length_kernel_takes_half_precision_only():
    if attention.varlen_attn is None:
        pytest.skip("this torch has no torch.nn.attention.varlen")
    assert varlen_problem(torch.device("cuda"), torch.bfloat16) is None
    assert "float32" in varlen_problem(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_variable_length_route_equals_the_batched_one(tiny_model, packed_input, monkeypatch, kv_heads):
    """The kernel needs a GPU; a stand-in with its signature takes its place: offsets, order and heads are tested."""

    def stand_in(query, key, value, offsets_q, offsets_k, longest_q, longest_k):
        assert offsets_q.dtype == torch.int32 and torch.equal(offsets_q, offsets_k) and longest_q == longest_k == 9
        assert query.shape == key.shape == value.shape, "this kernel has no grouped heads before torch 2.12"
        out = torch.empty_like(query)
        for start, end in itertools.pairwise(offsets_q.tolist()):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            out[start:end] = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        return out

    model = tiny_model(n_kv_heads=kv_heads)
    ids, positions = packed_input([9, 4, 9])
    with torch.no_grad():
        batched = model(input_ids=ids[None], position_ids=positions[None], lengths=[9, 4, 9]).logits
        monkeypatch.setattr(attention, "varlen_attn", stand_in)
        monkeypatch.setattr(type(model), "_packed_route", lambda self, x: "varlen")
        varlen = model(input_ids=ids[None], position_ids=positions[None], lengths=[9, 4, 9]).logits
    torch.testing.assert_close(varlen, batched, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_variable_length_kernel_equals_the_batched_route_on_a_gpu(tiny_model, packed_input):
    model = tiny_model(d_model=64, dtype=torch.bfloat16).cuda()
    ids, positions = (x.cuda() for x in packed_input([9, 4, 9]))
    logits = {}
    for kernel in ("auto", "batched"):
        model.packed_kernel = kernel
        logits[kernel] = model(input_ids=ids[None], position_ids=positions[None], lengths=[9, 4, 9]).logits.float()
    torch.testing.assert_close(logits["auto"], logits["batched"], atol=5e-2, rtol=0)


def test_attention_dropout_is_refused():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(UserError, match=r"dropout is 0\.1"):
        eager_attention(None, x, x, x, None, scaling=1.0, dropout=0.1)


def test_going_back_through_many_runs_builds_no_tensor_of_zeros(tiny_model, packed_input):
    """A slice's gradient would be one as large as all runs together, for every run."""
    from torch.profiler import ProfilerActivity, profile

    model, lengths = tiny_model(), [2, 3, 4, 5]
    ids, positions = packed_input(lengths)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        output = model(input_ids=ids[None], position_ids=positions[None], lengths=lengths)
        output.logits.sum().backward()
    names = {event.key for event in record.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names, "the packed route ran"
    assert not names & {"aten::slice_backward", "aten::select_backward"}
