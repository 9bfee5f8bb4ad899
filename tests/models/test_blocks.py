"""Gradient checkpointing switches on and changes nothing; of compilation see test_compile.py."""

import pytest
import torch

from laddpo.models.adapters import attach_lora, trainable_parameters
from laddpo.models.blocks import checkpoint_blocks
from laddpo.models.llada import LLaDABlock


def gradients(model, ids, positions, lengths):
    rows = torch.arange(0, len(ids), 2)
    output = model(input_ids=ids[None], position_ids=positions[None], lengths=lengths, rows=rows, targets=ids[rows])
    output.token_logps.sum().backward()
    return {name: p.grad for name, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_recomputes_every_block_and_gives_equal_gradients(tiny_model, packed_input, monkeypatch, lora):
    lengths = [5, 7, 5]
    ids, positions = packed_input(lengths)
    models = []
    for _ in range(2):
        model = tiny_model()
        if lora:  # then no input of a block needs a gradient
            attach_lora(model, r=2, seed=3)
        models.append(model)
    expected = gradients(models[0], ids, positions, lengths)
    calls = []
    plain = LLaDABlock.project
    monkeypatch.setattr(LLaDABlock, "project", lambda self, *a: calls.append(self.layer_idx) or plain(self, *a))
    checkpoint_blocks(models[1])
    got = gradients(models[1], ids, positions, lengths)
    assert calls == [0, 1, 1, 0], "forward in order, then each block once more in the backward pass"
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_checkpointing_saves_memory_between_forward_and_backward(tiny_model, packed_input):
    ids, positions = packed_input([8] * 4)
    sizes = []
    for enabled in (False, True):
        model = tiny_model()
        checkpoint_blocks(model, enabled)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t.numel()) or t, lambda t: t):
            model(input_ids=ids[None], position_ids=positions[None], lengths=[8] * 4)
        sizes.append(sum(saved))
    assert sizes[1] < sizes[0] / 3


def test_checkpointing_switches_off_again(tiny_model):
    model = tiny_model()
    checkpoint_blocks(model)
    checkpoint_blocks(model, enabled=False)
    assert not any(block.gradient_checkpointing for block in model.blocks)
    assert not model.get_input_embeddings()._forward_hooks, "transformers' hook would make every input need a gradient"
